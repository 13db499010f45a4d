"""What a collective needs from the device that its buffer is on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

__all__ = ["Buffer", "Device"]

Buffer = torch.Tensor
"""One-dimensional, contiguous, of one dtype, on one device."""


class Device(Protocol):
    """Memory and arithmetic of one kind of device."""

    def empty(self, length: int, dtype: torch.dtype) -> Buffer:
        """Memory for a bucket, uninitialised."""
        ...

    def scratch(self, length: int, dtype: torch.dtype) -> AbstractContextManager[Buffer]:
        """Memory for as long as a collective runs, uninitialised."""
        ...

    def scale(self, buffer: Buffer, weight: float) -> None:
        """``buffer *= weight``; a weight of 0 writes zeros, whatever was there."""
        ...

    def fold(self, op: str, partial: Buffer, incoming: Buffer, weight: float | None) -> None:
        """``partial = op(weight * partial, incoming)``. ``weight`` is for sums; None means 1.

        16-bit floats are combined in float32 and rounded once.
        """
        ...
