"""What is asked of CUDA, and nothing more: addresses and handles are plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

__all__ = ["Runtime"]


class Runtime(Protocol):
    """One GPU. Nothing here waits for it but ``malloc`` and ``free``, where CUDA itself may."""

    def malloc(self, nbytes: int) -> int:
        """Plain device memory, which MPI may read and CUDA IPC may map.

        Raises:
            GpuMemoryError: There is not so much left.
        """
        ...

    def free(self, address: int) -> None:
        """Give ``malloc``'s memory back."""
        ...

    def pinned(self, nbytes: int) -> int:
        """Host memory that the GPU copies from and to by itself; kept until the process ends."""
        ...

    def as_tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        """Device memory as bytes; ``owner`` lives as long as any view of it."""
        ...

    def current(self) -> AbstractContextManager[object]:
        """Whatever is asked of CUDA in this thread within is for this GPU."""
        ...

    def make_stream(self) -> int:
        """Of high priority: what the exchange adds should not wait for all of backward."""
        ...

    def caller(self) -> int:
        """torch's current stream in this thread.

        Raises:
            UnsupportedBufferError: It is being captured into a CUDA graph.
        """
        ...

    def callers(self) -> Sequence[int]:
        """The same, and CuPy's where that is another."""
        ...

    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        """torch works on ``stream`` within."""
        ...

    def make_event(self) -> int: ...

    def record(self, event: int, stream: int) -> None:
        """``event`` happens when all that ``stream`` was asked so far has."""
        ...

    def happened(self, event: int) -> bool: ...

    def let_wait(self, stream: int, event: int) -> None:
        """What ``stream`` is asked from now on comes after ``event``."""
        ...

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Between addresses on the host or on a GPU."""
        ...

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
        """As ``Device.combine``."""
        ...

    def export(self, address: int) -> bytes:
        """A handle with which another process of this node can ``open`` memory of ``malloc``.

        Raises:
            OSError: This memory cannot be shared.
        """
        ...

    def open(self, handle: bytes) -> int:
        """Address here of another process's memory.

        Raises:
            OSError: It cannot be mapped.
        """
        ...

    def close(self, address: int) -> None:
        """End what ``open`` began."""
        ...
