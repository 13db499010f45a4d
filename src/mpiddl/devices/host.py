"""Host memory: torch's own vectorised kernels add, and scratch is kept for the next call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer

__all__ = ["HOST", "HostDevice"]

_FOLDS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "prod": torch.mul,
}


class HostDevice:
    """CPU memory: buckets where the ranks of the node can reach them, scratch private.

    16-bit floats are computed in float32, and each result is rounded once.
    """

    KEPT_BYTES = 64 << 20  # scratch that waits for the next collective

    def __init__(self) -> None:
        self._kept: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._kept_bytes = 0

    def empty(self, length: int, dtype: torch.dtype, world: World) -> Buffer:
        nbytes = length * dtype.itemsize
        window = world.windows.allocate(nbytes) if nbytes and world.lane_window else None
        if window is None:
            return torch.empty(length, dtype=dtype, device="cpu")
        start = world.local_rank * window.part_bytes
        return torch.frombuffer(window.memory, dtype=dtype, count=length, offset=start)

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

    def combine(
        self, op: str, sources: Sequence[Buffer], weights: Sequence[float] | None, target: Buffer
    ) -> None:
        if weights is not None:
            terms = [(s, w) for s, w in zip(sources, weights, strict=True) if w != 0]
        else:
            terms = [(source, 1.0) for source in sources]
        if not terms:
            target.zero_()
            return
        (first, weight), rest = terms[0], terms[1:]
        narrow = target.dtype.itemsize == 2 and target.is_floating_point()
        if len(rest) == 1 and weights is None:
            _FOLDS[op](first, rest[0][0], out=target)  # 16 bits: computed in float32, rounded once
            return
        with self.scratch(len(target), torch.float32 if narrow else target.dtype) as total:
            if weights is None:
                total.copy_(first)
            else:
                torch.mul(first, weight, out=total)
            for number, (source, weight) in enumerate(rest):
                # Not into the target before the end: it may be a source that is still to come.
                out = target if number == len(rest) - 1 and not narrow else total
                if weights is None:
                    _FOLDS[op](total, source, out=out)
                else:
                    torch.add(total, source, alpha=weight, out=out)
            if narrow or not rest:
                target.copy_(total)


HOST = HostDevice()
