"""How the samples of an epoch are visited: step by step, by all ranks together.

A walk has ``len()``, the steps that are left of its epoch; ``total(step)``, the samples of all
ranks in one; and ``part(step)``, those of this rank. Every rank can compute every number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.kinds.base import Batches, Owned
from mpiddl.data.shards.permutation import Indices, Permutation

__all__ = ["Leg", "OrderedWalk", "OwnWalk", "Place", "Walk"]


class Place(NamedTuple):
    """This rank among all."""

    rank: int
    size: int


class Leg(NamedTuple):
    """What was visited of an epoch on one number of ranks, before it went on with another."""

    size: int
    steps: int


class Walk(Protocol):
    """See above."""

    def __len__(self) -> int: ...

    def total(self, step: int) -> int: ...

    def part(self, step: int, shares: NDArray[Any] | None) -> Indices: ...


class OrderedWalk:
    """Each rank a part of every batch of one global order.

    Args:
        batches: Of the whole epoch; they do not depend on the number of ranks, and so neither does
            how far the job has come.
        place: This rank.
        done: Batches that are behind.
    """

    def __init__(self, batches: Batches, place: Place, done: int) -> None:
        self._batches = batches
        self._place = place
        self._done = done

    def __len__(self) -> int:
        return len(self._batches) - self._done

    def total(self, step: int) -> int:
        return self._batches.total(self._done + step)

    def part(self, step: int, shares: NDArray[Any] | None) -> Indices:
        return self._batches.part(self._done + step, *self._place, shares)


class OwnWalk:
    """Each rank through its own samples, all in the same number of steps.

    On the number of ranks on which the epoch began no rank holds more than its own samples. When
    it goes on with another number, those that are left go to the ranks that own them now; every
    rank then holds all that are left.

    Args:
        sharding: Which samples a rank owns.
        own: This rank's samples, and how many each rank has: the same in every epoch.
        key: Chooses the order in which a rank visits its samples; None: as they are numbered.
        batch_size: Samples of a global batch, about: each step takes an even part of what each
            rank has.
        place: This rank.
        legs: What is behind; the last one on the present number of ranks.
    """

    def __init__(
        self,
        sharding: Owned,
        own: tuple[Indices | range, list[int]],
        key: Sequence[int] | None,
        batch_size: int,
        place: Place,
        legs: Sequence[Leg],
    ) -> None:
        *past, now = legs
        self._done = now.steps
        samples, lengths = own
        left: list[Indices] = []  # of each rank, once the epoch has changed ranks
        for number, leg in enumerate(past):
            then = [len(part) for part in left] if left else sharding.lengths(leg.size)
            unseen = []
            for rank in range(leg.size):
                theirs = left[rank] if left else sharding.shard(rank, leg.size)
                stage = _Stage(theirs, then, rank, key, number, batch_size)
                unseen.append(stage.after(leg.steps))
            rest = numpy.sort(numpy.concatenate(unseen))
            size = legs[number + 1].size
            owners = sharding.owners(rest, size)
            left = [rest[owners == rank] for rank in range(size)]
        if left:
            samples, lengths = left[place.rank], [len(part) for part in left]
        self._mine = _Stage(samples, lengths, place.rank, key, len(past), batch_size)

    @property
    def first(self) -> int:
        """A sample of this rank's; 0 if it has none."""
        return self._mine.first

    def __len__(self) -> int:
        return self._mine.steps - self._done

    def total(self, step: int) -> int:
        return self._mine.total(self._done + step)

    def part(self, step: int, shares: NDArray[Any] | None) -> Indices:
        return self._mine.part(self._done + step)


class _Stage:
    """One rank's samples between two changes of the number of ranks."""

    def __init__(
        self,
        samples: Indices | range,
        lengths: Sequence[int],
        rank: int,
        key: Sequence[int] | None,
        number: int,
        batch_size: int,
    ) -> None:
        self._samples = samples
        self._lengths = numpy.array(lengths, dtype=numpy.int64)
        self._rank = rank
        self.steps = -(-sum(lengths) // batch_size)
        self._order = None
        if key is not None:
            self._order = Permutation(len(samples), [*key, number, rank, len(lengths)])

    @property
    def first(self) -> int:
        return int(self._samples[0]) if len(self._samples) else 0

    def _bounds(self, step: int) -> Indices:
        """Where ``step`` begins on each rank. Those that take one more than others take turns."""
        size = len(self._lengths)
        phases = numpy.arange(size) * self.steps // size
        return (step * self._lengths + phases) // max(self.steps, 1)

    def total(self, step: int) -> int:
        return int((self._bounds(step + 1) - self._bounds(step)).sum())

    def part(self, step: int) -> Indices:
        return self._between(self._bounds(step)[self._rank], self._bounds(step + 1)[self._rank])

    def after(self, step: int) -> Indices:
        """What is left from ``step`` on."""
        return self._between(self._bounds(step)[self._rank], self._lengths[self._rank])

    def _between(self, start: numpy.int64, stop: numpy.int64) -> Indices:
        if self._order is None:
            return numpy.asarray(self._samples[start:stop], dtype=numpy.int64)
        places = self._order[slice(int(start), int(stop))]
        if isinstance(self._samples, range):
            return self._samples.start + places * self._samples.step
        return self._samples[places]
