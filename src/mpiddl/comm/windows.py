"""Memory that all ranks of a node have mapped, and the fence that orders writes to it.

A window is an unnamed file in shared memory, not an MPI window: its bytes are claimed when it is
made (a full /dev/shm is an answer, never a SIGBUS), it needs no collective call to be freed, and
nothing of it stays behind when a rank is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import mmap
import os
import platform
import tempfile
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mpiddl.base.log import logger
from mpiddl.base.units import format_bytes
from mpiddl.comm.layout import exchange
from mpiddl.errors import MismatchError

if TYPE_CHECKING:
    import torch
    from mpi4py import MPI

__all__ = ["Window", "Windows", "make_fence", "refuse_other_sizes", "remove_stale"]

FOLDER = Path("/dev/shm")  # noqa: S108 - memory of the node, by definition
PREFIX = "mpiddl-window-"
STALE_SECONDS = 3600.0
"""A window has a name for milliseconds only."""
RESERVE = 8 << 20
"""Bytes of shared memory that are left to MPI itself."""


class Window:
    """One part for each rank of a node, mapped by all of them.

    Unmapped once nothing refers to it any more: neither this object nor a view of ``memory``.

    Attributes:
        number: The same on every rank, and never used again.
        memory: All parts one after the other.
        part_bytes: Size of a part, a multiple of the page size.
    """

    def __init__(self, number: int, memory: mmap.mmap, part_bytes: int) -> None:
        self.number = number
        self.memory = memory
        self.part_bytes = part_bytes


class _Mapped(NamedTuple):
    """A window as this process sees it."""

    start: int
    part_bytes: int
    memory: weakref.ref[mmap.mmap]


class Windows:
    """Makes the windows of one world and finds them again by address.

    Args:
        comm: All ranks of the world; every one of them must make the same windows.
        node: Those of them that share this node.
    """

    def __init__(self, comm: MPI.Comm, node: MPI.Comm) -> None:
        self._comm = comm
        self._node = node
        self._rank: int = node.Get_rank()
        self._size: int = node.Get_size()
        self._made = 0
        self._known: dict[int, _Mapped] = {}
        self._starts: list[int] = []  # of this rank's parts, ascending
        self._numbers: list[int] = []  # the windows that they are in
        self._warned = False
        if self._rank == 0:
            remove_stale(FOLDER)

    def allocate(self, nbytes: int) -> Window | None:
        """A window with a part of ``nbytes`` for each rank; None, on every rank, if some node
        has not that much shared memory. Collective over the world.

        Raises:
            MismatchError: On every rank, if ranks ask for different sizes.
        """
        part_bytes = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        refuse_other_sizes(self._comm, part_bytes, "shared memory")
        handle, problem = self._open_together(part_bytes * self._size)
        memory = None
        if handle is not None:
            memory, problem = _map(handle, part_bytes, self._rank, self._size)
        problems = [text for text in exchange(self._comm, problem) if text is not None]
        if problems or memory is None:
            self._warn(problems[0], nbytes)
            return None
        number = self._made = self._made + 1
        self._forget_unmapped()
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._known[number] = _Mapped(start, part_bytes, weakref.ref(memory))
        own = start + self._rank * part_bytes
        at = bisect_right(self._starts, own)
        self._starts.insert(at, own)
        self._numbers.insert(at, number)
        return Window(number, memory, part_bytes)

    def _open_together(self, nbytes: int) -> tuple[int | None, str | None]:
        """A new file of ``nbytes``, open on all ranks of the node, or None and the reason.

        It has lost its name before any rank claims memory, which is where a rank may be killed.
        """
        own, problem = _create(nbytes) if self._rank == 0 else (None, None)
        try:
            path, problem = exchange(self._node, [own, problem])[0]
            handle = None
            if path is not None:
                handle, problem = _open(path)
            exchange(self._node, None)  # all have it open
        finally:
            if own is not None:
                os.unlink(own)
        exchange(self._node, None)  # its name is gone
        return handle, problem

    def _forget_unmapped(self) -> None:
        """Their addresses may be used again; their numbers are not."""
        gone = {number for number, mapped in self._known.items() if mapped.memory() is None}
        if gone:
            kept = [
                pair
                for pair in zip(self._starts, self._numbers, strict=True)
                if pair[1] not in gone
            ]
            self._starts, self._numbers = [start for start, _ in kept], [n for _, n in kept]
            self._known = {n: mapped for n, mapped in self._known.items() if n not in gone}

    def _warn(self, problem: str, nbytes: int) -> None:
        if not self._warned and self._comm.Get_rank() == 0:
            logger.warning(
                "no shared memory for %s a rank (%s): private memory and messages are used, which "
                "is slower; free %s, or start a container with --shm-size=8g",
                format_bytes(nbytes),
                problem,
                FOLDER,
            )
        self._warned = True

    def find(self, address: int) -> tuple[int, int]:
        """Number of the window in which ``address`` is, and how far from the start of this rank's
        part; (0, 0) if it is in none."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            offset, number = address - self._starts[at], self._numbers[at]
            mapped = self._known[number]
            if offset < mapped.part_bytes and mapped.memory() is not None:
                return number, offset
        return 0, 0

    def views(
        self, number: int, offsets: Sequence[int], length: int, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Every rank's buffer at ``offsets`` in its part of a window that is mapped here.

        Views do not keep the window mapped: whoever uses them holds something that does.
        """
        start, part_bytes, _ = self._known[number]
        return [
            _at(start + rank * part_bytes + offset, length, dtype)
            for rank, offset in enumerate(offsets)
        ]


def refuse_other_sizes(comm: MPI.Comm, nbytes: int, what: str) -> None:
    """Raise MismatchError on every rank if they do not ask for the same ``nbytes``. Collective."""
    asked = exchange(comm, nbytes)
    if len(set(asked)) > 1:
        wanted = ", ".join(f"rank {rank} {size}" for rank, size in enumerate(asked[:8]))
        raise MismatchError(
            f"ranks asked for {what} of different sizes (bytes: {wanted}); every rank must pass "
            "the same shape and dtype"
        )


def _at(address: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The memory at an address as a tensor, which does not own it."""
    import torch

    if length == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    memory = (ctypes.c_char * (length * dtype.itemsize)).from_address(address)
    with torch.inference_mode(mode=False):  # who keeps it may write to it outside of that mode
        return torch.frombuffer(memory, dtype=dtype)


def _create(nbytes: int) -> tuple[str | None, str | None]:
    """A file of ``nbytes`` and None, or None and the reason."""
    try:
        state = os.statvfs(FOLDER)
        free = state.f_bavail * state.f_frsize
        if free < nbytes + RESERVE:
            return None, f"{format_bytes(free)} left in {FOLDER}"
        handle, path = tempfile.mkstemp(prefix=PREFIX, dir=FOLDER)
    except OSError as error:
        return None, str(error)
    try:
        os.ftruncate(handle, nbytes)
    except OSError as error:
        os.unlink(path)
        return None, str(error)
    finally:
        os.close(handle)
    return path, None


def remove_stale(folder: Path) -> None:
    """Remove names that ranks have left which were killed between making a file and opening it."""
    oldest = time.time() - STALE_SECONDS
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            state = path.lstat()
            if state.st_uid == os.geteuid() and state.st_mtime < oldest:
                path.unlink()


def _open(path: str) -> tuple[int | None, str | None]:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW), None
    except OSError as error:  # ranks in containers of their own have no /dev/shm in common
        return None, str(error)


def _map(handle: int, part_bytes: int, rank: int, size: int) -> tuple[mmap.mmap | None, str | None]:
    """The file as memory, this rank's part claimed by this rank: near its cores."""
    try:
        # Claims the pages, so that touching them can never fail; ENOSPC otherwise.
        os.posix_fallocate(handle, rank * part_bytes, part_bytes)
        return mmap.mmap(handle, size * part_bytes), None
    except OSError as error:
        return None, str(error)
    finally:
        os.close(handle)


@functools.cache
def make_fence() -> Callable[[], object] | None:
    """What to call between data and flag, on both sides; None where the processor needs nothing.

    x86 keeps stores in order, and loads in order, as seen by other cores. Elsewhere MPI's own
    barrier for shared memory does it (MPI_Win_sync, on a window of this process alone).
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return None
    from mpi4py import MPI

    window = MPI.Win.Allocate_shared(1, comm=MPI.COMM_SELF)
    window.Lock_all()
    atexit.register(window.Free)  # before MPI's own finalizer
    atexit.register(window.Unlock_all)
    fence: Callable[[], object] = window.Sync
    return fence
