"""Host memory: torch's own vectorised kernels add, and scratch is kept for the next call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from mpiddl.base.waits import ALREADY, Wait
from mpiddl.comm.messages import Messages
from mpiddl.comm.windows import Windows
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, as_dtype

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

    late = False
    in_cache = True
    KEPT_BYTES = 64 << 20  # scratch that waits for the next collective

    def __init__(self) -> None:
        self._kept: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._kept_bytes = 0

    def empty(self, length: int, dtype: torch.dtype, world: World) -> Buffer:
        nbytes = length * dtype.itemsize
        # Of nothing too: ranks that ask for different sizes learn it there.
        window = world.windows.allocate(max(1, nbytes)) if world.lane_window else None
        if window is None or not length:
            return torch.empty(length, dtype=dtype, device="cpu")
        start = world.layout.place * window.part_bytes
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
            # A tensor that is made in inference mode could not be written outside of it.
            with torch.inference_mode(mode=False):
                memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        yield as_dtype(memory[: length * dtype.itemsize], dtype)
        # Not after an exception: messages may still arrive in it, and keep it until they have.
        if self._kept_bytes + nbytes <= self.KEPT_BYTES:
            kept.append(memory)
            self._kept_bytes += nbytes

    def copy(self, target: Buffer, source: Buffer) -> None:
        target.copy_(source)

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
        self,
        op: str,
        sources: Sequence[Buffer],
        weights: Sequence[float] | None,
        targets: Sequence[Buffer],
    ) -> None:
        first, *others = targets
        if weights is None and len(sources) == 2:
            _FOLDS[op](*sources, out=first)  # 16 bits: computed in float32, rounded once
        else:
            self._combine(op, sources, weights, first)
        for other in others:  # the result is in the cache still
            other.copy_(first)

    def _combine(
        self, op: str, sources: Sequence[Buffer], weights: Sequence[float] | None, target: Buffer
    ) -> None:
        pairs = [(source, 1.0) for source in sources]
        if weights is not None:
            pairs = [(s, w) for s, w in zip(sources, weights, strict=True) if w != 0]
        if not pairs:
            target.zero_()
            return
        # The sum is formed in the target itself, unless that is a source which is still to come.
        narrow = target.dtype.itemsize == 2 and target.is_floating_point()
        later = {source.data_ptr() for source, _ in pairs[1:]}
        if not narrow and target.data_ptr() not in later:
            _accumulate(op, pairs, weights is not None, target, target)
            return
        with self.scratch(len(target), torch.float32 if narrow else target.dtype) as total:
            _accumulate(op, pairs, weights is not None, total, total if narrow else target)
            if narrow:
                target.copy_(total)

    def fence(self) -> Wait:
        return ALREADY

    def caller(self) -> int:
        return 0

    def after(self, callers: Iterable[int]) -> AbstractContextManager[object]:
        return nullcontext()

    def settled(self, callers: Iterable[int] | None = None) -> Wait:
        return ALREADY

    def hand_back(self) -> None:
        pass

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mapped(self, world: World) -> Windows:
        return world.windows

    def messages(self, world: World) -> Messages:
        return world.messages

    def stagings(self, world: World) -> Sequence[str]:
        return ()

    def use_staging(self, world: World, staging: str) -> None:
        raise AssertionError("host memory goes in messages as it is")


def _accumulate(
    op: str, pairs: Sequence[tuple[Buffer, float]], weighted: bool, total: Buffer, last: Buffer
) -> None:
    """``op(w0 * source0, w1 * source1, ...)``, in that order, formed in ``total``; the last step
    writes to ``last``."""
    (first, weight), rest = pairs[0], pairs[1:]
    out = total if rest else last
    if weighted and first.dtype != out.dtype:  # 16 bits: torch.mul would round before it widens
        out.copy_(first).mul_(weight)
    elif weighted:
        torch.mul(first, weight, out=out)
    elif first is not out:
        out.copy_(first)
    for number, (source, weight) in enumerate(rest, start=1):
        out = total if number < len(rest) else last
        if weighted:
            torch.add(total, source, alpha=weight, out=out)
        else:
            _FOLDS[op](total, source, out=out)


HOST = HostDevice()
