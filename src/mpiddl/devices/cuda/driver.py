"""CUDA itself, through CuPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from mpiddl.base.units import format_bytes
from mpiddl.devices.cuda.kernels import Kernels
from mpiddl.errors import GpuMemoryError, UnsupportedBufferError

__all__ = ["CudaRuntime"]


class CudaRuntime:
    """CUDA through CuPy.

    Args:
        index: Of the device, as torch counts.
    """

    NOT_READY = 600  # cudaErrorNotReady
    HIGHEST_PRIORITY = -100  # CUDA takes the nearest that there is

    def __init__(self, index: int) -> None:
        import cupy

        self._cuda: Any = cupy.cuda
        self._api: Any = cupy.cuda.runtime
        self._ndarray: Any = cupy.ndarray
        self._kernels = Kernels()
        self.index = index

    def malloc(self, nbytes: int) -> int:
        with self.current():
            try:
                return int(self._api.malloc(nbytes))
            except self._api.CUDARuntimeError:
                torch.cuda.empty_cache()  # what torch keeps for later may be what is missing
            try:
                return int(self._api.malloc(nbytes))
            except self._api.CUDARuntimeError as error:
                free, total = torch.cuda.mem_get_info(self.index)
                raise GpuMemoryError(
                    f"cuda:{self.index} has no {format_bytes(nbytes)} in one piece ({error}; "
                    f"{format_bytes(free)} of {format_bytes(total)} are free)"
                ) from None

    def free(self, address: int) -> None:
        with self.current():
            self._api.free(address)

    def pinned(self, nbytes: int) -> int:
        with self.current():
            return int(self._api.hostAlloc(nbytes, self._api.hostAllocPortable))

    def as_tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        # The device is told, not looked up: a peer's memory may be on another one, and is only
        # handed to kernels of this one.
        memory = self._cuda.UnownedMemory(address, nbytes, owner, self.index)
        with self.current(), torch.inference_mode(mode=False):
            array = self._ndarray((nbytes,), "u1", self._cuda.MemoryPointer(memory, 0))
            tensor: torch.Tensor = torch.from_dlpack(array)  # type: ignore[attr-defined]
            return tensor

    @contextmanager
    def current(self) -> Iterator[None]:
        before = self._api.getDevice()  # CuPy's own Device is not for two threads at a time
        if before == self.index:
            yield
            return
        self._api.setDevice(self.index)
        try:
            yield
        finally:
            self._api.setDevice(before)

    def make_stream(self) -> int:
        with self.current():
            return int(
                self._api.streamCreateWithPriority(
                    self._api.streamNonBlocking, self.HIGHEST_PRIORITY
                )
            )

    def caller(self) -> int:
        with self.current():
            captured = torch.cuda.is_current_stream_capturing()
        if captured:
            raise UnsupportedBufferError(
                "a CUDA graph is being captured: MPI's messages cannot be part of a graph. Capture "
                "forward and backward inside model.no_sync(), or leave the capture out"
            )
        return int(torch.cuda.current_stream(self.index).cuda_stream)

    def callers(self) -> Sequence[int]:
        torchs, cupys = self.caller(), int(self._cuda.get_current_stream(self.index).ptr)
        return (torchs,) if cupys == torchs else (torchs, cupys)

    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        known = torch.cuda.ExternalStream(stream, device=self.index)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(known)

    def make_event(self) -> int:
        with self.current():
            return int(self._api.eventCreateWithFlags(self._api.eventDisableTiming))

    def record(self, event: int, stream: int) -> None:
        with self.current():  # number 0 is the default stream of the thread's GPU
            self._api.eventRecord(event, stream)

    def happened(self, event: int) -> bool:
        status = self._api.eventQuery(event)
        if status not in (0, self.NOT_READY):  # a kernel of somebody's has failed
            raise self._api.CUDARuntimeError(status)
        return bool(status == 0)

    def let_wait(self, stream: int, event: int) -> None:
        with self.current():
            self._api.streamWaitEvent(stream, event)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._api.memcpyAsync(target, source, nbytes, self._api.memcpyDefault, stream)

    def combine(
        self,
        op: str,
        dtype: str,
        sources: Sequence[int],
        weights: Sequence[float] | None,
        targets: Sequence[int],
        length: int,
        stream: int,
    ) -> None:
        with self.current():
            self._kernels.combine(op, dtype, sources, weights, targets, length, stream)

    def export(self, address: int) -> bytes:
        try:
            return bytes(self._api.ipcGetMemHandle(address))
        except self._api.CUDARuntimeError as error:
            raise OSError(str(error)) from None

    def open(self, handle: bytes) -> int:
        with self.current():
            try:
                return int(self._api.ipcOpenMemHandle(handle))
            except self._api.CUDARuntimeError as error:
                raise OSError(str(error)) from None

    def close(self, address: int) -> None:
        with self.current():
            self._api.ipcCloseMemHandle(address)
