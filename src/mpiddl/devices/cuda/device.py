"""GPU memory: our kernels add, on a stream of our own; nothing ever waits for the whole device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from mpiddl.base.waits import ALREADY, AllOf, Wait
from mpiddl.comm.messages import ByteMessages
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, as_dtype
from mpiddl.devices.cuda.kernels import MOST_SOURCES
from mpiddl.devices.cuda.memory import CudaWindows
from mpiddl.devices.cuda.runtime import Runtime
from mpiddl.devices.cuda.streams import Event, Events
from mpiddl.devices.staging import PIECE_BYTES, Stage, StagedMessages

__all__ = ["CudaDevice"]


class CudaDevice:
    """One GPU.

    What is asked of it is carried out in order on one stream of high priority, some time after
    the call has returned. Thread-safe where a user's thread meets the engine's: ``settled`` and
    ``hand_back`` may be called while another thread drives collectives.

    Args:
        runtime: CUDA.
        mpi_reads_it: Whether MPI can read its memory, asked once; else messages go through pinned
            host memory.
    """

    late = True
    in_cache = False

    def __init__(self, runtime: Runtime, mpi_reads_it: Callable[[World], bool]) -> None:
        self.runtime = runtime
        self._mpi_reads_it = mpi_reads_it
        self._events = Events(runtime)
        self._stream = runtime.make_stream()
        self._asked = False  # anything since the last fence
        self._fence: Wait = ALREADY
        self._torch_works = 0  # on our stream, unseen by us
        self._kept: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._windows: dict[World, CudaWindows] = {}
        self._stage: Stage | None = None
        self._messages: dict[World, ByteMessages] = {}

    # Memory.

    def empty(self, length: int, dtype: torch.dtype, world: World) -> Buffer:
        windows = self.mapped(world)
        memory = windows.allocate(max(1, length * dtype.itemsize))
        return as_dtype(memory[: length * dtype.itemsize], dtype)

    @contextmanager
    def scratch(self, length: int, dtype: torch.dtype) -> Iterator[Buffer]:
        nbytes = 1 << max(9, (length * dtype.itemsize - 1).bit_length())
        kept = self._kept[nbytes]
        if kept:
            memory = kept.pop()
        else:
            address = self.runtime.malloc(nbytes)
            memory = self.runtime.as_tensor(address, nbytes, None)
        yield as_dtype(memory[: length * dtype.itemsize], dtype)
        # Not after an exception: messages may still arrive in it. Never freed: cudaFree waits for
        # everything on the GPU.
        kept.append(memory)

    def mapped(self, world: World) -> CudaWindows:
        windows = self._windows.get(world)
        if windows is None:
            windows = self._windows[world] = CudaWindows(self.runtime, world)
            world.at_close(self._forget)
        return windows

    def messages(self, world: World) -> ByteMessages:
        if world not in self._messages:
            self.use_staging(world, self.stagings(world)[0])
        return self._messages[world]

    def stagings(self, world: World) -> Sequence[str]:
        return ("device", "host") if self._mpi_reads_it(world) else ("host",)

    def use_staging(self, world: World, staging: str) -> None:
        # In the same pieces either way: ranks that go one way may meet some that go the other.
        messages: ByteMessages = world.messages.in_pieces(PIECE_BYTES)
        if staging == "host":
            self._stage = self._stage or Stage(self.runtime, self._events)
            messages = StagedMessages(self._stage, messages)
        self._messages[world] = messages
        world.at_close(self._forget)

    def _forget(self, world: World) -> None:
        windows = self._windows.pop(world, None)
        if windows is not None:
            windows.close()
        messages = self._messages.pop(world, None)
        if isinstance(messages, StagedMessages):
            messages.give_up()

    # Arithmetic.

    def copy(self, target: Buffer, source: Buffer) -> None:
        if target.dtype != source.dtype:
            with self.stream():
                target.copy_(source)
        elif len(target):
            self.runtime.copy(target.data_ptr(), source.data_ptr(), target.nbytes, self._stream)
        self._asked = True

    def scale(self, buffer: Buffer, weight: float) -> None:
        self.combine("sum", [buffer], [weight], [buffer])

    def fold(self, op: str, partial: Buffer, incoming: Buffer, weight: float | None) -> None:
        weights = None if weight is None else (weight, 1.0)
        self.combine(op, (partial, incoming), weights, (partial,))

    def combine(
        self,
        op: str,
        sources: Sequence[Buffer],
        weights: Sequence[float] | None,
        targets: Sequence[Buffer],
    ) -> None:
        if len(sources) > MOST_SOURCES:  # 16-bit sums are rounded once more for each 15 more
            first, rest = sources[:MOST_SOURCES], sources[MOST_SOURCES:]
            w_first = None if weights is None else weights[:MOST_SOURCES]
            w_rest = None if weights is None else [1.0, *weights[MOST_SOURCES:]]
            with self.scratch(len(targets[0]), targets[0].dtype) as total:
                self.combine(op, first, w_first, [total])
                self.combine(op, [total, *rest], w_rest, targets)
            return
        self.runtime.combine(
            op,
            str(targets[0].dtype).removeprefix("torch."),
            [source.data_ptr() for source in sources],
            weights,
            [target.data_ptr() for target in targets[:MOST_SOURCES]],
            len(targets[0]),
            self._stream,
        )
        self._asked = True
        for more in targets[MOST_SOURCES:]:  # which may be sources too
            self.copy(more, targets[0])

    # Order.

    def fence(self) -> Wait:
        if self._asked or self._torch_works:
            self._asked = False  # before the event: what is asked meanwhile needs another one
            self._fence = self._events.after(self._stream)
        return ALREADY if self._fence.done() else self._fence

    def caller(self) -> int:
        return self.runtime.caller()

    @contextmanager
    def after(self, callers: Iterable[int]) -> Iterator[None]:
        own = self.runtime.caller()
        others = [stream for stream in callers if stream != own]
        for stream in others:
            self._events.after(stream).hold_up(own)
        yield
        for stream in others:  # torch may give them the memory that was read
            self._events.after(own).hold_up(stream)

    def settled(self, callers: Iterable[int] | None = None) -> Wait:
        streams = self.runtime.callers() if callers is None else callers
        return AllOf(self._events.after(stream) for stream in streams)

    def hand_back(self) -> None:
        done: Event = self._events.after(self._stream)
        for stream in self.runtime.callers():
            done.hold_up(stream)

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._torch_works += 1
        try:
            with self.runtime.on_stream(self._stream):
                yield
        finally:
            self._torch_works -= 1
            self._asked = True
