"""Host memory: torch's own vectorised kernels add, and scratch is kept for the next call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mpiddl.devices.base import Buffer

__all__ = ["HOST", "HostDevice"]

_FOLDS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "prod": torch.mul,
}


class HostDevice:
    """CPU memory, private to the rank.

    16-bit floats are computed in float32, and each result is rounded once.
    """

    KEPT_BYTES = 64 << 20  # scratch that waits for the next collective

    def __init__(self) -> None:
        self._kept: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._kept_bytes = 0

    def empty(self, length: int, dtype: torch.dtype) -> Buffer:
        return torch.empty(length, dtype=dtype, device="cpu")

    @contextmanager
    def scratch(self, length: int, dtype: torch.dtype) -> Iterator[Buffer]:
        # Fresh memory costs a page fault every 4 KiB, more than adding what arrives in it.
        nbytes = 1 << max(6, (length * dtype.itemsize - 1).bit_length())
        kept = self._kept[nbytes]
        if kept:
            memory = kept.pop()
            self._kept_bytes -= nbytes
        else:
            memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        yield memory[: length * dtype.itemsize].view(dtype)
        # Not after an exception: messages may still arrive in it.
        if self._kept_bytes + nbytes <= self.KEPT_BYTES:
            kept.append(memory)
            self._kept_bytes += nbytes

    def scale(self, buffer: Buffer, weight: float) -> None:
        if weight == 0:  # 0 * nan would be nan
            buffer.zero_()
        else:
            buffer.mul_(weight)

    def fold(self, op: str, partial: Buffer, incoming: Buffer, weight: float | None) -> None:
        if weight is None:
            _FOLDS[op](partial, incoming, out=partial)
        elif weight == 0:
            partial.copy_(incoming)
        elif partial.dtype.itemsize == 2:
            # torch would round the weight itself to 16 bits: thirds would not sum to one.
            partial.copy_(partial.float().mul_(weight).add_(incoming))
        else:
            torch.add(incoming, partial, alpha=weight, out=partial)


HOST = HostDevice()
