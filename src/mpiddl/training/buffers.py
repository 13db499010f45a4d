"""A model's buffers, such as BatchNorm's running statistics, become rank 0's."""

from __future__ import annotations

import torch

from mpiddl.collectives.channel import bytes_of
from mpiddl.overlap.control import Control
from mpiddl.overlap.work import Work
from mpiddl.plain import gapless

__all__ = ["BufferBroadcast"]


class BufferBroadcast:
    """Copies rank 0's buffers to all ranks, packed, in the background.

    At the end of backward, which every rank reaches, and not before forward, which a rank
    without samples leaves out: evaluation on one rank alone waits for nobody.

    Args:
        module: Its buffers may be replaced, but every rank has the same ones.
        control: Carries them.
    """

    def __init__(self, module: torch.nn.Module, control: Control) -> None:
        self._module = module
        self._control = control
        self._work: Work | None = None
        self._targets: list[torch.Tensor] = []
        self._mine = False
        self._packed = torch.empty(0, dtype=torch.uint8, device="cpu")

    def start(self, root: int = 0) -> None:
        """Take rank ``root``'s as they are now."""
        self._targets = [buffer for buffer in self._module.buffers() if buffer.numel()]
        if not self._targets:
            return
        with torch.no_grad():
            self._packed = torch.cat([bytes_of(gapless(buffer)) for buffer in self._targets])
        self._work = self._control.broadcast(self._packed, root)
        self._mine = root == self._control.rank

    def finish(self) -> None:
        """Wait for them; nothing, if none were started."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        if self._mine:  # and may have changed since
            return
        sizes = [buffer.numel() * buffer.itemsize for buffer in self._targets]
        with torch.no_grad():
            for target, memory in zip(self._targets, torch.split(self._packed, sizes), strict=True):
                copy = gapless(target)
                bytes_of(copy).copy_(memory)
                if copy.data_ptr() != target.data_ptr():
                    target.copy_(copy)
