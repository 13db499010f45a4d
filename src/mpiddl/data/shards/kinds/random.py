"""One order of all samples, by default a random one and another one every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpiddl.data.shards.kinds.base import cuts, refuse_empty
from mpiddl.data.shards.kinds.consecutive import AsTheyAre, Order, Windows
from mpiddl.data.shards.permutation import Indices, Permutation

__all__ = ["Random"]


@dataclass
class Random:
    """Consecutive parts of a random order; no rank ever holds that order.

    Args:
        length: Samples.
        seed: Of the order.
        shuffle: Else the order is the data set's own.

    Source:
        ``mpiddl.data.shards.permutation``.
    """

    length: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        refuse_empty(self.length)

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle}

    def shard(self, rank: int, size: int, epoch: int = 0) -> Indices:
        return self._order(epoch)[cuts(0, self.length, size, None)[rank]]

    def batches(self, epoch: int, batch_size: int, drop_last: bool) -> Windows:
        return Windows(self._order(epoch), batch_size, drop_last)

    def _order(self, epoch: int) -> Order:
        if not self.shuffle:
            return AsTheyAre(self.length)
        return Permutation(self.length, [self.seed, epoch])
