"""Each rank every n-th sample: even for data that are sorted by time or length."""

from __future__ import annotations

from dataclasses import dataclass

from mpiddl.data.shards.kinds.base import refuse_empty
from mpiddl.data.shards.permutation import Indices

__all__ = ["Strided"]


@dataclass(frozen=True)
class Strided:
    """Sample i to rank i modulo the number of ranks."""

    length: int

    def __post_init__(self) -> None:
        refuse_empty(self.length)

    def shard(self, rank: int, size: int, epoch: int = 0) -> range:
        return range(rank, self.length, size)

    def owners(self, indices: Indices, size: int) -> Indices:
        return indices % size

    def lengths(self, size: int) -> list[int]:
        return [len(self.shard(rank, size)) for rank in range(size)]
