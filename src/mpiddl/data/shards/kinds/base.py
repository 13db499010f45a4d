"""What every sharding can say: which samples a rank has in an epoch. Arithmetic only."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy
from numpy.typing import NDArray

from mpiddl.base.segments import split
from mpiddl.data.shards.permutation import Indices
from mpiddl.errors import DataError

__all__ = [
    "Batches",
    "Ordered",
    "Owned",
    "Sharding",
    "checksum_of",
    "cuts",
    "facts_of",
    "refuse_empty",
    "refuse_other_data",
]


GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, without what is before the point, are as evenly spread as can be."""


class Sharding(Protocol):
    """Deals ``length`` samples out to ranks. The same answer on every rank, for the same arguments.

    Where ``facts()`` is there, it tells in plain JSON what decides who gets what, besides the
    numbers of samples and ranks: ranks must agree on it, and so must who goes on with an epoch.
    Where an epoch has more or fewer samples than the data set, ``dataset_length`` is that one's.

    Attributes:
        length: Samples of an epoch, over all ranks.
    """

    length: int

    def shard(self, rank: int, size: int, epoch: int = 0) -> Indices | range:
        """The samples of ``rank`` among ``size`` ranks."""
        ...


@runtime_checkable
class Owned(Sharding, Protocol):
    """A sharding in which a sample belongs to the same rank in every epoch."""

    def owners(self, indices: Indices, size: int) -> Indices:
        """The rank of each of ``indices`` among ``size`` ranks."""
        ...

    def lengths(self, size: int) -> list[int]:
        """How many samples each of ``size`` ranks has."""
        ...


class Batches(Protocol):
    """The global batches of an epoch, which do not depend on the number of ranks."""

    def __len__(self) -> int: ...

    def total(self, step: int) -> int:
        """Samples of global batch ``step``."""
        ...

    def part(self, step: int, rank: int, size: int, shares: NDArray[Any] | None) -> Indices:
        """The samples of it that ``rank`` has; with ``shares``, in proportion to them."""
        ...


@runtime_checkable
class Ordered(Sharding, Protocol):
    """A sharding of one global order, in which every rank takes a part of every global batch."""

    def batches(self, epoch: int, batch_size: int, drop_last: bool) -> Batches:
        """The global batches of ``epoch``."""
        ...


def facts_of(sharding: Sharding) -> dict[str, Any]:
    """Its name, and its facts if it tells them."""
    facts: dict[str, Any] = getattr(sharding, "facts", dict)()
    return {"sharding": type(sharding).__name__, **facts}


def checksum_of(values: NDArray[Any]) -> str:
    """How many numbers, and whether they are the same elsewhere."""
    raw = numpy.ascontiguousarray(values).tobytes()
    return f"{len(values)} values with checksum {zlib.crc32(raw):08x}"


def refuse_other_data(sharding: Sharding, length: int) -> None:
    """Raise DataError if a sharding was made for another number of samples."""
    own = getattr(sharding, "dataset_length", sharding.length)
    if own != length:
        raise DataError(f"the sharding was made for {own} samples, the data set has {length}")


def refuse_empty(length: int) -> None:
    """Raise DataError if there is no sample."""
    if length < 1:
        raise DataError("the data set is empty")


def cuts(start: int, stop: int, size: int, shares: NDArray[Any] | None) -> list[slice]:
    """Consecutive slices of the places from ``start`` to ``stop``, one for each rank.

    Without ``shares`` their lengths differ by at most one. With them each is its share rounded up
    or down, so that shares hold in the long run: all borders are shifted by the same part of a
    sample, another one in each batch, and then rounded down (systematic sampling).

    Args:
        start: Where the batch begins in the epoch.
        stop: Where it ends.
        size: Number of ranks.
        shares: Of each rank; they add up to 1.
    """
    length = stop - start
    if shares is None:
        return [slice(start + part.start, start + part.stop) for part in split(length, size)]
    shift = start // max(1, length) * GOLDEN % 1.0
    borders = numpy.floor(length * numpy.cumsum(shares) + shift).astype(numpy.int64).tolist()
    borders = [0, *borders[:-1], length]
    return [slice(start + a, start + b) for a, b in pairwise(borders)]
