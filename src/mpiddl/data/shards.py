"""The global order of an epoch and each rank's part of it. Arithmetic only."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from mpiddl.segments import split

__all__ = ["epoch_order", "part_of"]


def epoch_order(length: int, epoch: int, seed: int, shuffle: bool) -> NDArray[numpy.int64]:
    """Indices of all samples in the order of ``epoch``, the same on every rank."""
    if not shuffle:
        return numpy.arange(length)
    return numpy.random.default_rng([seed, epoch]).permutation(length)


def part_of(indices: NDArray[numpy.int64], rank: int, size: int) -> NDArray[numpy.int64]:
    """Rank ``rank``'s consecutive part; the parts' lengths differ by at most one."""
    return indices[split(len(indices), size)[rank]]
