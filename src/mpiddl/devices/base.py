"""What a collective needs from the device that its buffer is on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from mpiddl.base.waits import Wait
from mpiddl.comm.messages import ByteMessages
from mpiddl.comm.world import World

__all__ = ["Buffer", "Device", "MappedMemory", "as_dtype"]

Buffer = torch.Tensor
"""One-dimensional, contiguous, of one dtype, on one device."""


class MappedMemory(Protocol):
    """Finds memory that every rank of a node has mapped: windows."""

    def find(self, address: int) -> tuple[int, int]:
        """Number of the window in which ``address`` is, and how far from the start of this rank's
        part; (0, 0) if it is in none."""
        ...

    def views(
        self, number: int, offsets: Sequence[int], length: int, dtype: torch.dtype
    ) -> list[Buffer]:
        """Every rank's buffer at ``offsets`` in its part of a window."""
        ...


class Device(Protocol):
    """Memory and arithmetic of one kind of device.

    A device may be late: ``copy``, ``scale``, ``fold`` and ``combine`` are carried out one after
    the other, but maybe long after they return, and MPI knows nothing of that. So a collective
    waits for a ``fence`` before it sends what one of them has written, and before it receives into
    what one of them still reads or writes. Memory belongs either to whoever calls a
    collective, or, from when the caller has ``settled`` to ``hand_back``, to the collective.

    Attributes:
        late: Whether that is so; on the host all happens at once.
        in_cache: Whether memory that was just combined is cheap to read again.
    """

    late: bool
    in_cache: bool

    def empty(self, length: int, dtype: torch.dtype, world: World) -> Buffer:
        """Memory that the other ranks of the node can reach, where there is such memory; not
        initialised. Collective over ``world``.
        """
        ...

    def scratch(self, length: int, dtype: torch.dtype) -> AbstractContextManager[Buffer]:
        """Memory for as long as a collective runs, uninitialised. What used it before may still
        be under way: receive into it after a fence."""
        ...

    def copy(self, target: Buffer, source: Buffer) -> None:
        """``target = source``, of the same dtype or, on the device's own memory, of another."""
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
        self,
        op: str,
        sources: Sequence[Buffer],
        weights: Sequence[float] | None,
        targets: Sequence[Buffer],
    ) -> None:
        """``target = op(w0 * source0, w1 * source1, ...)``, in that order, for every target.

        A target may be one of the sources. Weights are for sums; a weight of 0 leaves its source
        out, whatever is there. 16-bit floats are added in float32 and rounded once.
        """
        ...

    def fence(self) -> Wait:
        """Done when all of the above that was asked for up to now has happened."""
        ...

    def caller(self) -> int:
        """The stream on which whoever calls works; a number that ``settled`` understands."""
        ...

    def after(self, callers: Iterable[int]) -> AbstractContextManager[object]:
        """What the caller's stream is asked within comes after all that these streams were asked so
        far, and before what they are asked from then on."""
        ...

    def settled(self, callers: Iterable[int] | None = None) -> Wait:
        """Done when all that these streams were asked so far has happened; None: that of whoever
        calls.

        A collective begins after that. It is the host that waits: a stream that did would hold up
        whatever else is asked of this device, such as another bucket's sums.
        """
        ...

    def hand_back(self) -> None:
        """What is asked of the caller's stream from now on comes after all that was asked of this
        device so far."""
        ...

    def stream(self) -> AbstractContextManager[object]:
        """What torch is asked within comes after all of the above, and before what follows."""
        ...

    def mapped(self, world: World) -> MappedMemory:
        """The windows of ``world`` on this device."""
        ...

    def messages(self, world: World) -> ByteMessages:
        """Carries this device's memory between ranks."""
        ...

    def stagings(self, world: World) -> Sequence[str]:
        """The ways that messages can go on this rank, ``"device"`` or ``"host"``; first the one
        that they do go. Empty where there is no choice."""
        ...

    def use_staging(self, world: World, staging: str) -> None:
        """Let messages go another way from now on: to compare them. None may be under way."""
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
