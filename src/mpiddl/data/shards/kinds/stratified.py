"""The class mix of the data set on every rank and in every global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.kinds.base import checksum_of, cuts, refuse_empty
from mpiddl.data.shards.labels import codes_of
from mpiddl.data.shards.permutation import Indices, Permutation

__all__ = ["Stratified"]


class Stratified:
    """Each rank has its share of every class, and so has each global batch, rounded up or down.

    Sorted by class, samples are dealt out like cards, one to each batch in turn: any run of cards,
    a class for one, is then spread evenly over the batches. Ranks take their turns in the same
    row of cards. Batches are of equal size, within one, and no larger than asked for. Which sample
    of a class is which card, and which batch comes when, changes every epoch.

    Args:
        length: Samples.
        labels: One for each sample: integers or strings.
        seed: Of the order within classes, and of batches.

    Raises:
        DataError: Labels do not fit.
    """

    def __init__(self, length: int, labels: Sequence[Any] | NDArray[Any], seed: int = 0) -> None:
        refuse_empty(length)
        codes, self.classes = codes_of(labels, length)
        self.length = length
        self.seed = seed
        self._labels = checksum_of(codes)
        self._members = numpy.argsort(codes, kind="stable")
        counts = numpy.bincount(codes)
        self._stops = numpy.cumsum(counts)
        self._starts = self._stops - counts
        self._orders: tuple[int, dict[int, Permutation]] = -1, {}

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed, "labels": self._labels}

    def shard(self, rank: int, size: int, epoch: int = 0) -> Indices:
        cards = numpy.arange(self.length)
        ranks = _ranks_of(cards, self._starts[self._classes_of(cards)], 1, size)
        return self._samples(cards[ranks == rank], epoch)

    def batches(self, epoch: int, batch_size: int, drop_last: bool) -> _Deal:
        return _Deal(self, epoch, batch_size, drop_last)

    def _classes_of(self, cards: Indices) -> Indices:
        return numpy.searchsorted(self._starts, cards, side="right") - 1

    def _samples(self, cards: Indices, epoch: int) -> Indices:
        """What the cards are: the members of each class in the order of the epoch."""
        result = numpy.empty_like(cards)
        classes = self._classes_of(cards)
        for number in numpy.unique(classes).tolist():
            mine = classes == number
            start, stop = self._starts[number], self._stops[number]
            order = self._order_of(number, int(stop - start), epoch)
            result[mine] = self._members[start + order.at(cards[mine] - start)]
        return result

    def _order_of(self, number: int, length: int, epoch: int) -> Permutation:
        """Of a class; kept for one epoch, since every batch asks for most of them."""
        if self._orders[0] != epoch:
            self._orders = epoch, {}
        orders = self._orders[1]
        if number not in orders:
            orders[number] = Permutation(length, [self.seed, epoch, number])
        return orders[number]


class _Deal:
    """The epoch's batches: card i to batch i modulo their number.

    With ``drop_last`` all batches are equally large; what is left out is spread over the cards.
    """

    def __init__(self, sharding: Stratified, epoch: int, batch_size: int, drop_last: bool) -> None:
        self._sharding = sharding
        self._epoch = epoch
        length = sharding.length
        self._steps = length // batch_size if drop_last else -(-length // batch_size)
        self._kept = self._steps * batch_size if drop_last else length
        left_out = numpy.arange(length - self._kept)
        # The k-th of m cards that are left out stands in the middle of the k-th m-th of all.
        self._gaps = (2 * left_out + 1) * length // max(1, 2 * len(left_out)) - left_out
        self._starts = sharding._starts - numpy.searchsorted(
            self._gaps + left_out, sharding._starts
        )
        # Which batch comes when says nothing about classes.
        self._order = Permutation(self._steps, [sharding.seed, epoch])

    def __len__(self) -> int:
        return self._steps

    def total(self, step: int) -> int:
        return len(self._cards(step))

    def part(self, step: int, rank: int, size: int, shares: NDArray[Any] | None) -> Indices:
        cards = self._cards(step)
        classes = numpy.searchsorted(self._starts, cards, side="right") - 1
        if shares is None:
            mine = _ranks_of(cards, self._starts[classes], self._steps, size) == rank
        else:
            # Classes mixed, so that any consecutive part has its share of each.
            counts = numpy.bincount(classes)
            within = numpy.arange(len(cards)) - (numpy.cumsum(counts) - counts)[classes]
            mixed = numpy.argsort((2 * within + 1) / counts[classes], kind="stable")
            start = step * len(cards)
            part = cuts(start, start + len(cards), size, shares)[rank]
            mine = numpy.sort(mixed[part.start - start : part.stop - start])
        kept = cards[mine]
        kept += numpy.searchsorted(self._gaps, kept, side="right")  # as if none were left out
        return self._sharding._samples(kept, self._epoch)

    def _cards(self, step: int) -> Indices:
        batch = int(self._order[step : step + 1][0])
        return numpy.arange(batch, self._kept, self._steps)


def _ranks_of(cards: Indices, starts: Indices, num_batches: int, size: int) -> Indices:
    """The rank of each card.

    Card i goes to rank i modulo ``size``, which shares out every run of cards evenly. But a batch
    has every ``num_batches``-th card: where that number and ``size`` have a common factor these
    would be the same few ranks', and so everything moves on by one rank after as many cards as it
    takes to return to the same ranks. Within a class it moves after a multiple of ``size`` cards,
    and so each class stays evenly shared out to the last sample. Parts of a batch differ by at
    most one sample; by more only in some of those that have the first ``size`` cards.

    Args:
        cards: Places among all samples, sorted by class.
        starts: Of each card's class.
        num_batches: How many the cards are dealt to.
        size: Number of ranks.
    """
    if math.gcd(num_batches, size) == 1:
        return cards % size
    rounds = starts + (cards - starts) // size * size
    ranks: Indices = (cards + rounds // math.lcm(num_batches, size)) % size
    return ranks
