"""Each rank a consecutive stretch: reads are sequential, and files need not be shared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from mpiddl.base.segments import split
from mpiddl.data.shards.kinds.base import refuse_empty
from mpiddl.data.shards.permutation import Indices

__all__ = ["Contiguous"]


@dataclass(frozen=True)
class Contiguous:
    """Rank 0 the first samples, and so on; shares differ by at most one sample."""

    length: int

    def __post_init__(self) -> None:
        refuse_empty(self.length)

    def shard(self, rank: int, size: int, epoch: int = 0) -> range:
        return range(self.length)[split(self.length, size)[rank]]

    def owners(self, indices: Indices, size: int) -> Indices:
        short, longer = divmod(self.length, size)
        border = longer * (short + 1)  # the first ranks have one more
        return numpy.where(
            indices < border, indices // (short + 1), longer + (indices - border) // max(short, 1)
        )

    def lengths(self, size: int) -> list[int]:
        return [len(self.shard(rank, size)) for rank in range(size)]
