"""Files that the ranks of a node have in common, with names that other processes open.

Every rank that uses such a file holds a shared lock on it. The kernel drops the lock with the
process, however it ends, so whoever can have the file for itself alone knows that nobody needs it
any more, and removes it: the last rank that lets go of it, or, after a crash, the next job's start.
Where the file system has no locks, whoever made the file removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.base.locks import lock
from mpiddl.base.units import format_bytes
from mpiddl.comm.windows import FOLDER, RESERVE

__all__ = ["SharedFile", "map_shared", "remove_unused"]

PREFIX = "mpiddl-data-"


class SharedFile:
    """A file that this process holds; made by ``create`` and ``join``.

    Attributes:
        path: Where other processes of this node find it.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle
        self._made_without_lock = False
        self._owner = os.getpid()

    @classmethod
    def create(cls, folder: Path, nbytes: int) -> SharedFile:
        """A new file, none of whose bytes is claimed yet.

        Raises:
            OSError: The folder cannot be written, or has less space left.
        """
        state = os.statvfs(folder)
        # Something is left to MPI itself.
        free = state.f_bavail * state.f_frsize - (RESERVE if folder == FOLDER else 0)
        if free < nbytes:
            raise OSError(f"only {format_bytes(max(0, free))} are left")
        while True:
            handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
            file = cls(Path(name), handle)
            try:
                file._made_without_lock = not lock(handle, fcntl.LOCK_SH)
                # Another job's start may have been quicker with its lock, and removed it.
                if os.fstat(handle).st_nlink > 0:
                    os.ftruncate(handle, nbytes)
                    return file
            except OSError:
                Path(name).unlink(missing_ok=True)
                os.close(handle)
                raise
            os.close(handle)

    @classmethod
    def join(cls, path: Path) -> SharedFile:
        """A file that another rank made and still holds.

        Raises:
            OSError: There is none, or it is not this user's.
        """
        handle = _open(path, os.O_RDWR)
        lock(handle, fcntl.LOCK_SH)
        return cls(path, handle)

    def claim(self, start: int, nbytes: int) -> None:
        """Make sure of the space, so that touching it can never fail.

        Raises:
            OSError: There is too little.
        """
        if nbytes > 0:
            os.posix_fallocate(self._handle, start, nbytes)

    def write(self, piece: NDArray[numpy.uint8], at: int) -> None:
        """Write bytes where they belong. Raises: OSError: It did not work."""
        rest = piece.data
        while rest:
            written = os.pwrite(self._handle, rest, at)
            rest, at = rest[written:], at + written

    def close(self) -> None:
        """Let go of the file, and remove it if nobody else holds it. What is mapped stays."""
        # A forked child has the very same lock; it is its parent's.
        if self._handle < 0 or os.getpid() != self._owner:
            return
        with contextlib.suppress(OSError):
            if self._made_without_lock:
                self.path.unlink()
            elif lock(self._handle, fcntl.LOCK_UN):
                _remove_if_unused(self.path, self._handle)
        os.close(self._handle)
        self._handle = -1


def map_shared(path: Path, nbytes: int) -> mmap.mmap:
    """The file's first ``nbytes`` as memory that can only be read.

    Raises:
        OSError: It is gone, is not this user's, or is shorter.
    """
    handle = _open(path, os.O_RDONLY)
    try:
        if os.fstat(handle).st_size < nbytes:
            raise OSError(f"{path} is shorter than {nbytes} bytes")
        return mmap.mmap(handle, nbytes, prot=mmap.PROT_READ)
    finally:
        os.close(handle)


def remove_unused(folder: Path) -> None:
    """Remove the files of jobs that were killed. Those that somebody holds stay."""
    with contextlib.suppress(OSError):
        for path in _files_in(folder):
            with contextlib.suppress(OSError), _opened(path) as handle:
                _remove_if_unused(path, handle)


def _files_in(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PREFIX}*"))


def _remove_if_unused(path: Path, handle: int) -> None:
    """Raises: BlockingIOError: Somebody holds it."""
    if lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = _open(path, os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)


def _open(path: Path, flags: int) -> int:
    """A handle of a plain file of this user's, and of nothing else that may have its name."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found: Any = os.fstat(handle)
    if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise PermissionError(f"{path} is not a file of this user's")
    return handle
