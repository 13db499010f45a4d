"""One rank's file on the disks of all nodes."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy

from mpiddl.comm.world import World, current_world
from mpiddl.data.progress_bar import progress
from mpiddl.data.relay import PIECE_BYTES, Piece, Relay, check_same_root, reason_of, writers_of
from mpiddl.data.signatures import checks_world
from mpiddl.overlap.calls import gather_json
from mpiddl.overlap.together import raise_together
from mpiddl.segments import chunked
from mpiddl.units import format_bytes

__all__ = ["broadcast_file"]


@checks_world
def broadcast_file(
    path: str | os.PathLike[str],
    world: World | None = None,
    *,
    to: str | os.PathLike[str] | None = None,
    root: int = 0,
) -> Path:
    """Copy rank ``root``'s file to the disks of the nodes that do not have it. Collective.

    One rank of each node writes. A node where a file of the same length and checksum is there
    already, on a shared file system for example, is left out. The copy gets its name when it is
    complete and on the disk; until then it is ``<name>.part-<random>`` beside it.

    Args:
        path: The file that rank ``root`` reads.
        world: The ranks; default those of ``mpiddl.init()``.
        to: Where it belongs on this rank's node, the same for all ranks of a node; default
            ``path``. Missing folders are made.
        root: The rank that has the file.

    Returns:
        Where every rank of the node can read it: ``to``, or ``path``.

    Raises:
        DataError: On every rank: the file is missing, changed while it was read, or could not be
            written on one of the nodes; what was written is removed.
    """
    world = world or current_world()
    check_same_root(root, world)
    source, target = Path(path), Path(path if to is None else to)
    with contextlib.ExitStack() as opened:
        file, problem = None, None
        if world.rank == root:
            try:
                file = opened.enter_context(_Source(source))
            except OSError as error:
                problem = (
                    f"cannot read {source} ({reason_of(error)}); pass a file that rank {root} has"
                )
        raise_together(problem, world)
        needing = _needing(file, target, writers_of(world, root), root, world)
        if needing:
            _send(file, target, needing, root, world)
    raise_together(_unreadable(target), world)
    return target


class _Source:
    """The file that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # would wait for a pipe's writer
        self._state = os.fstat(self._handle)
        self.nbytes = self._state.st_size
        self.mode = stat.S_IMODE(self._state.st_mode)
        self.checksum = 0  # of what was read in order
        if not stat.S_ISREG(self._state.st_mode):
            os.close(self._handle)
            raise OSError("not a file")

    def read(self, part: slice) -> Piece:
        """The next part of the file; all of them are read, in order."""
        piece = numpy.empty(part.stop - part.start, dtype=numpy.uint8)
        rest = piece.data
        while rest:
            count = os.preadv(self._handle, [rest], part.stop - len(rest))
            if count == 0:
                raise OSError(f"{self.path} became shorter while it was read")
            rest = rest[count:]
        self.checksum = zlib.crc32(piece.data, self.checksum)
        return piece

    def problem(self) -> str | None:
        """Whether somebody wrote to it meanwhile."""
        now = os.fstat(self._handle)
        if (now.st_size, now.st_mtime_ns) == (self._state.st_size, self._state.st_mtime_ns):
            return None
        return f"{self.path} was changed while it was read; copy a file that nobody writes to"

    def is_at(self, path: Path) -> bool:
        return path.exists() and os.path.samestat(self._state, path.stat())

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


class _Part:
    """A copy that is being written, and gone at the end of the ``with`` unless it was published."""

    def __init__(self, target: Path, nbytes: int, mode: int) -> None:
        with contextlib.suppress(FileExistsError):
            target.parent.mkdir(parents=True)
        handle, name = tempfile.mkstemp(prefix=f"{target.name}.part-", dir=target.parent)
        self._handle, self._path, self._target = handle, Path(name), target
        self._nbytes = nbytes
        self._checksum = 0
        try:
            os.fchmod(handle, mode)
            if nbytes:
                os.posix_fallocate(handle, 0, nbytes)
        except OSError:
            self.__exit__()
            raise

    def write(self, piece: Piece) -> None:
        self._checksum = zlib.crc32(piece.data, self._checksum)
        rest = piece.data
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def finish(self, checksum: int) -> str | None:
        """All of it is on the disk; or what is wrong with it."""
        os.fsync(self._handle)
        length = os.lseek(self._handle, 0, os.SEEK_CUR)
        if length == self._nbytes and self._checksum == checksum:
            return None
        return (
            f"{self._target} arrived damaged ({length} of {self._nbytes} bytes, checksum "
            f"{self._checksum:08x}, not {checksum:08x}); try again, and look at the network"
        )

    def publish(self) -> None:
        """Give it its name."""
        os.replace(self._path, self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)
        self._path.unlink(missing_ok=True)


def _needing(
    file: _Source | None, target: Path, writers: list[int], root: int, world: World
) -> list[int]:
    """The writers whose node does not have the file. Collective."""
    nbytes = gather_json(file.nbytes if file else None, world=world)[root]
    alike, needs, problem = False, False, None
    try:
        if world.rank in writers and not (file and file.is_at(target)):
            alike = target.is_file() and target.stat().st_size == nbytes
            needs = not alike
    except OSError as error:
        problem = f"cannot look at {target} ({reason_of(error)})"
    raise_together(problem, world)
    if any(gather_json(alike, world=world)):
        found, checksum = None, None
        try:
            found = _checksum(target, world) if alike else None
            checksum = _checksum(file.path, world) if file else None
        except OSError as error:
            problem = f"cannot compare {target} with other nodes' ({reason_of(error)})"
        raise_together(problem, world)
        wanted = gather_json(checksum, world=world)[root]
        needs = needs or (alike and found != wanted)
    return [rank for rank, wants in enumerate(gather_json(needs, world=world)) if wants]


def _checksum(path: Path, world: World) -> int:
    with _Source(path) as file, progress(file.nbytes, f"comparing {path.name}", world) as bar:
        for piece in chunked(slice(0, file.nbytes), PIECE_BYTES):
            bar.advance(len(file.read(piece)))
        return file.checksum


def _send(file: _Source | None, target: Path, needing: list[int], root: int, world: World) -> None:
    """Write the file on those ranks' nodes. Collective."""
    nbytes, mode = gather_json([file.nbytes, file.mode] if file else None, world=world)[root]
    with contextlib.ExitStack() as opened:
        part, problem = None, None
        if world.rank in needing:
            try:
                part = opened.enter_context(_Part(target, nbytes, mode))
            except OSError as error:
                problem = (
                    f"cannot write {format_bytes(nbytes)} to {target} ({reason_of(error)}); make "
                    "room, or pass to=... in another folder"
                )
        raise_together(problem, world)
        with Relay({root, *needing}, root, world, nbytes, f"copying {target.name}") as relay:
            for piece in chunked(slice(0, nbytes), PIECE_BYTES):
                relay.pass_on(
                    piece.stop - piece.start,
                    partial(file.read, piece) if file else None,
                    part.write if part else None,
                )
            relay.check()
        sent = gather_json(file.checksum if file else None, world=world)[root]
        try:
            problem = file.problem() if file else None
            if part and not problem:
                problem = part.finish(sent)
        except OSError as error:
            problem = f"cannot write {target} ({reason_of(error)})"
        raise_together(problem, world)
        try:
            if part:
                part.publish()
        except OSError as error:
            problem = f"cannot replace {target} ({reason_of(error)})"
        raise_together(problem, world)


def _unreadable(path: Path) -> str | None:
    try:
        with _Source(path):
            return None
    except OSError as error:
        return f"cannot read {path} ({reason_of(error)}); pass to=... in a folder of this node"
