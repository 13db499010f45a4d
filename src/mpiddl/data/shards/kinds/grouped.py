"""All samples of a patient, a user, a document on one rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.kinds.base import checksum_of, refuse_empty
from mpiddl.data.shards.labels import codes_of
from mpiddl.data.shards.permutation import Indices
from mpiddl.errors import DataError

__all__ = ["Grouped"]


class Grouped:
    """Groups stay whole; the largest first, each to the rank that has the least by then.

    Args:
        length: Samples.
        groups: One for each sample: integers or strings.

    Raises:
        DataError: Groups do not fit; when sharding, fewer groups than ranks.

    Source:
        Graham, SIAM J. Appl. Math. 17(2), 1969: the largest share is at most 4/3 of the best.
    """

    def __init__(self, length: int, groups: Sequence[Any] | NDArray[Any]) -> None:
        refuse_empty(length)
        self.length = length
        self._groups, _ = codes_of(groups, length, "groups")

    def facts(self) -> dict[str, Any]:
        return {"groups": checksum_of(self._groups)}

    def shard(self, rank: int, size: int, epoch: int = 0) -> Indices:
        return numpy.flatnonzero(self._ranks(size)[self._groups] == rank)

    def owners(self, indices: Indices, size: int) -> Indices:
        return self._ranks(size)[self._groups[indices]]

    def lengths(self, size: int) -> list[int]:
        counts = numpy.bincount(self._ranks(size)[self._groups], minlength=size)
        return [int(count) for count in counts]

    def _ranks(self, size: int) -> Indices:
        """The rank of each group."""
        lengths = numpy.bincount(self._groups)
        if len(lengths) < size:
            raise DataError(f"{len(lengths)} groups for {size} ranks: start fewer ranks")
        ranks = numpy.empty(len(lengths), dtype=numpy.int64)
        loads = [(0, rank) for rank in range(size)]
        for group in numpy.argsort(-lengths, kind="stable").tolist():
            load, rank = loads[0]
            ranks[group] = rank
            heapq.heapreplace(loads, (load + int(lengths[group]), rank))
        return ranks
