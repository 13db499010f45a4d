"""Resampling of a skewed data set: every class as often as every other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.kinds.base import checksum_of, cuts, refuse_empty
from mpiddl.data.shards.kinds.consecutive import Windows
from mpiddl.data.shards.labels import codes_of
from mpiddl.data.shards.permutation import Indices, Permutation

__all__ = ["Balanced"]


class Balanced:
    """Draws with replacement, so that each class makes up the same part of every batch.

    Not exact, on purpose: samples of rare classes come several times in an epoch, and of frequent
    ones some do not come. Within a class all come equally often, within one.

    Args:
        length: Samples of the data set, and draws of an epoch.
        labels: One for each sample: integers or strings.
        seed: Of the draws.
        draws: Of an epoch, where it is not ``length``.

    Raises:
        DataError: Labels do not fit.
    """

    def __init__(
        self,
        length: int,
        labels: Sequence[Any] | NDArray[Any],
        seed: int = 0,
        draws: int | None = None,
    ) -> None:
        refuse_empty(length)
        codes, _ = codes_of(labels, length)
        self.dataset_length = length
        self.length = length if draws is None else draws
        refuse_empty(self.length)
        self.seed = seed
        self._labels = checksum_of(codes)
        order = numpy.argsort(codes, kind="stable")
        self._members = numpy.split(order, numpy.cumsum(numpy.bincount(codes))[:-1])

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed, "labels": self._labels, "draws": self.length}

    def shard(self, rank: int, size: int, epoch: int = 0) -> Indices:
        return _Draws(self._members, self.length, self.seed, epoch)[
            cuts(0, self.length, size, None)[rank]
        ]

    def batches(self, epoch: int, batch_size: int, drop_last: bool) -> Windows:
        draws = _Draws(self._members, self.length, self.seed, epoch)
        return Windows(draws, batch_size, drop_last)


class _Draws:
    """Classes take turns; each walks through its samples in one random order after another."""

    def __init__(self, members: list[Indices], length: int, seed: int, epoch: int) -> None:
        self._members = members
        self._length = length
        self._key = [seed, epoch]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: slice) -> Indices:
        draws = numpy.arange(*places.indices(self._length))
        result = numpy.empty_like(draws)
        turns, classes = numpy.divmod(draws, len(self._members))
        for number in numpy.unique(classes).tolist():
            mine = classes == number
            result[mine] = self._draw(number, turns[mine])
        return result

    def _draw(self, number: int, turns: Indices) -> Indices:
        members = self._members[number]
        rounds, places = numpy.divmod(turns, len(members))
        result = numpy.empty_like(turns)
        for turn in numpy.unique(rounds).tolist():
            now = rounds == turn
            order = Permutation(len(members), [*self._key, number, turn])
            result[now] = members[order.at(places[now])]
        return result
