"""Uneven shares for ranks of uneven speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.kinds.base import cuts, refuse_empty
from mpiddl.data.shards.kinds.consecutive import Windows
from mpiddl.data.shards.permutation import Indices, Permutation
from mpiddl.errors import DataError

__all__ = ["Weighted", "shares_of"]


def shares_of(weights: Sequence[float] | NDArray[Any], size: int) -> NDArray[numpy.float64]:
    """``weights`` scaled so that they add up to 1.

    Raises:
        DataError: Not one for each rank, or not positive numbers.
    """
    shares = numpy.asarray(weights, dtype=numpy.float64)
    if shares.shape != (size,):
        raise DataError(f"{len(shares.ravel())} weights for {size} ranks: pass one for each rank")
    if not (numpy.isfinite(shares).all() and (shares > 0).all()):
        raise DataError(f"weights must be positive numbers, got {shares.tolist()}")
    result: NDArray[numpy.float64] = shares / shares.sum()
    return result


class Weighted:
    """A random order of which each rank has a part in proportion to its weight.

    In a batch sampler every rank's part of every global batch is in that proportion.

    Args:
        length: Samples.
        weights: One for each rank, its speed say.
        seed: Of the order.
    """

    def __init__(self, length: int, weights: Sequence[float], seed: int = 0) -> None:
        refuse_empty(length)
        self.length = length
        self.weights = weights
        self.seed = seed
        shares_of(weights, len(weights))

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed}  # weights may change, as shares do

    def shard(self, rank: int, size: int, epoch: int = 0) -> Indices:
        part = cuts(0, self.length, size, shares_of(self.weights, size))[rank]
        return Permutation(self.length, [self.seed, epoch])[part]

    def batches(self, epoch: int, batch_size: int, drop_last: bool) -> Windows:
        return Windows(Permutation(self.length, [self.seed, epoch]), batch_size, drop_last)
