"""Memory that all ranks of a node have mapped, and the fence that orders writes to it.

A window is an unnamed file in shared memory, not an MPI window: its bytes are claimed when it is
made (a full /dev/shm is an answer, never a SIGBUS), it needs no collective call to be freed, and
nothing of it stays behind when a rank is killed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpiddl.comm.layout import exchange
from mpiddl.log import logger
from mpiddl.units import format_bytes

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Window", "Windows", "make_fence"]

FOLDER = Path("/dev/shm")  # noqa: S108 - memory of the node, by definition
PREFIX = "mpiddl-"
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
        self._known: dict[int, tuple[int, int, weakref.ref[mmap.mmap]]] = {}
        self._warned = False

    def allocate(self, nbytes: int) -> Window | None:
        """A window with a part of ``nbytes`` for each rank; None, on every rank, if some node
        has not that much shared memory. Collective over the world.
        """
        part_bytes = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        number = self._made = self._made + 1
        path, problem = None, None
        if self._rank == 0:
            path, problem = _create(part_bytes * self._size)
        path, problem = exchange(self._node, [path, problem])[0]
        memory = None
        if path is not None:
            memory, problem = _map(path, part_bytes, self._rank, self._size)
        problems = [text for text in exchange(self._comm, problem) if text is not None]
        if path is not None and self._rank == 0:
            os.unlink(path)  # all have it open; nothing stays behind, whoever dies when
        if problems or memory is None:
            self._warn(problems[0], nbytes)
            return None
        window = Window(number, memory, part_bytes)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + self._rank * part_bytes
        self._known[number] = (start, start + part_bytes, weakref.ref(memory))
        return window

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
        for number, (start, stop, memory) in list(self._known.items()):
            if memory() is None:
                del self._known[number]
            elif start <= address < stop:
                return number, address - start
        return 0, 0

    def memory(self, number: int) -> mmap.mmap | None:
        """The memory of a window that is still mapped here."""
        known = self._known.get(number)
        return known[2]() if known else None


def _create(nbytes: int) -> tuple[str | None, str | None]:
    """A file of ``nbytes`` and None, or None and the reason."""
    try:
        state = os.statvfs(FOLDER)
        free = state.f_bavail * state.f_frsize
        if free < nbytes + RESERVE:
            return None, f"{format_bytes(free)} left in {FOLDER}"
        handle, path = tempfile.mkstemp(prefix=PREFIX, dir=FOLDER)
        os.ftruncate(handle, nbytes)
        os.close(handle)
    except OSError as error:
        return None, str(error)
    return path, None


def _map(path: str, part_bytes: int, rank: int, size: int) -> tuple[mmap.mmap | None, str | None]:
    """The file as memory, this rank's part claimed by this rank: near its cores."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError as error:  # ranks in containers of their own have no /dev/shm in common
        return None, str(error)
    try:
        # Claims the pages, so that touching them can never fail; ENOSPC otherwise.
        os.posix_fallocate(handle, rank * part_bytes, part_bytes)
        return mmap.mmap(handle, size * part_bytes), None
    except OSError as error:
        return None, str(error)
    finally:
        os.close(handle)


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
    fence: Callable[[], object] = window.Sync
    return fence
