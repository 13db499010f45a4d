"""What a collective needs from the device that its buffer is on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from mpiddl.comm.world import World

__all__ = ["Buffer", "Device", "as_dtype"]

Buffer = torch.Tensor
"""One-dimensional, contiguous, of one dtype, on one device."""


class Device(Protocol):
    """Memory and arithmetic of one kind of device."""

    def empty(self, length: int, dtype: torch.dtype, world: World) -> Buffer:
        """Memory that the other ranks of the node can reach, where there is such memory; not
        initialised. Collective over ``world``.
        """
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

    def combine(
        self, op: str, sources: Sequence[Buffer], weights: Sequence[float] | None, target: Buffer
    ) -> None:
        """``target = op(w0 * source0, w1 * source1, ...)``, in that order.

        ``target`` may be one of the sources. Weights are for sums; a weight of 0 leaves its source
        out, whatever is there. 16-bit floats are added in float32 and rounded once.
        """
        ...


def as_dtype(memory: torch.Tensor, dtype: torch.dtype) -> Buffer:
    """Bytes as a buffer that may be written in any mode of autograd.

    In inference mode ``view`` would make a tensor that may not be written outside of that mode,
    and a collective may be driven now from within that mode, now from outside.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(mode=False):
            return memory.view(dtype)
    return memory.view(dtype)
