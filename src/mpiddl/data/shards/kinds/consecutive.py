"""Global batches that follow one after the other in an order."""

from __future__ import annotations

from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.kinds.base import cuts
from mpiddl.data.shards.permutation import Indices

__all__ = ["AsTheyAre", "Order", "Windows"]


class Order(Protocol):
    """What is at consecutive places of an order."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> Indices: ...


class AsTheyAre:
    """The order in which samples are numbered."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: slice) -> Indices:
        return numpy.arange(*places.indices(self._length))


class Windows:
    """``batch_size`` samples at a time; the last batch may be smaller.

    Args:
        order: All samples of an epoch.
        batch_size: Samples of a global batch.
        drop_last: Leave out the last batch where it is smaller.
    """

    def __init__(self, order: Order, batch_size: int, drop_last: bool) -> None:
        self._order = order
        self._batch_size = batch_size
        full, rest = divmod(len(order), batch_size)
        self._steps = full if drop_last or rest == 0 else full + 1

    def __len__(self) -> int:
        return self._steps

    def total(self, step: int) -> int:
        return min(self._batch_size, len(self._order) - step * self._batch_size)

    def part(self, step: int, rank: int, size: int, shares: NDArray[Any] | None) -> Indices:
        start = step * self._batch_size
        return self._order[cuts(start, start + self.total(step), size, shares)[rank]]
