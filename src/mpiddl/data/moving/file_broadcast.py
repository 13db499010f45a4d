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

from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import gather_json
from mpiddl.base.segments import chunked
from mpiddl.base.units import format_bytes
from mpiddl.comm.world import World, current_world
from mpiddl.data.moving.node_stream import (
    PIECE_BYTES,
    Piece,
    Relay,
    check_same_root,
    reason_of,
    writers_of,
)
from mpiddl.data.moving.progress_bar import progress
from mpiddl.data.signatures import checks_world

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

    One rank of each node writes; where nodes see the same folder, one rank of all of them. A node
    where a file of the same length and checksum is there already is left out. The copy gets its
    name when it is complete and on the disk; until then it is ``<name>.part-<random>`` beside it.
    It may be read, written and executed by whom the file may, and has no other rights
    (no setuid).

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


_RIGHTS = 0o777
"""Of user, group and others. A copy has its writer as owner, so setuid would mean another user."""


class _Source:
    """The file that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # would wait for a pipe's writer
        self._state = os.fstat(self._handle)
        self.nbytes = self._state.st_size
        self.mode = stat.S_IMODE(self._state.st_mode) & _RIGHTS
        self.identity = _identity(self._state)
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

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


class _Part:
    """A copy that is being written, and gone at the end of the ``with`` unless it was published."""

    def __init__(self, target: Path, mode: int) -> None:
        with contextlib.suppress(FileExistsError):
            target.parent.mkdir(parents=True)
        handle, name = tempfile.mkstemp(prefix=f"{target.name}.part-", dir=target.parent)
        self._handle, self._path, self._target = handle, Path(name), target
        self._nbytes = 0
        self._checksum = 0
        try:
            os.fchmod(handle, mode)
            self.owner = os.fstat(handle).st_uid
        except OSError:
            self.__exit__()
            raise

    @property
    def name(self) -> str:
        return self._path.name

    def claim(self, nbytes: int) -> None:
        """Make sure of the space."""
        self._nbytes = nbytes
        if nbytes:
            os.posix_fallocate(self._handle, 0, nbytes)

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
    here, problem = None, None
    try:
        if world.rank in writers and target.is_file():
            here = _identity(target.stat())
    except OSError as error:
        problem = f"cannot look at {target} ({reason_of(error)})"
    raise_together(problem, world)
    facts = gather_json([file.identity if file else None, here], world=world)
    source, there = facts[root][0], [identity for _, identity in facts]
    # Nodes that see one and the same file read it once; where it is the source, not at all.
    alike = [found for found in there if found and found != source and found[0] == source[0]]
    checksums: list[int | None] = [None] * world.size
    wanted = None
    if alike:
        found, checksum = None, None
        try:
            if here in alike and there.index(here) == world.rank:
                found = _checksum(target, world)
            checksum = _checksum(file.path, world) if file else None
        except OSError as error:
            problem = f"cannot compare {target} with other nodes' ({reason_of(error)})"
        raise_together(problem, world)
        checksums = gather_json(found, world=world)
        wanted = gather_json(checksum, world=world)[root]
    return [
        rank
        for rank in writers
        if there[rank] != source
        and not (there[rank] in alike and checksums[there.index(there[rank])] == wanted)
    ]


def _identity(state: os.stat_result) -> list[int]:
    """What two nodes find alike in one file, and in no two files.

    Not the device: each node has a number of its own for a network file system. But nobody can set
    the time of change, so two disks do not agree in it by chance.
    """
    return [state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]


def _sharing_once(part: _Part | None, target: Path, needing: list[int], world: World) -> list[int]:
    """Of the ranks in ``needing``, the first of those that see one folder. Collective.

    Each has begun a part with a random name. Who finds the part of another rank in its own folder
    has that folder in common with it. (Device and inode of a folder would not do: both may be alike
    on the disks of two nodes, and both may differ on a network file system.)
    """
    own = [target.name, part.name, part.owner] if part else None
    parts = gather_json(own, world=world)
    first = None
    if own:
        first = next(rank for rank in needing if rank == world.rank or _sees(target, *parts[rank]))
    firsts = gather_json(first, world=world)
    return [rank for rank in needing if firsts[rank] == rank]


def _sees(target: Path, target_name: str, part_name: str, owner: int) -> bool:
    """Whether another rank's part, of the same file, is in the folder of this rank's."""
    try:
        found = os.lstat(target.parent / part_name)
    except OSError:
        return False
    # Another user may have put a file of that name there.
    return target.name == target_name and found.st_uid == owner and stat.S_ISREG(found.st_mode)


def _checksum(path: Path, world: World) -> int:
    with _Source(path) as file, progress(file.nbytes, f"comparing {path.name}", world) as bar:
        for piece in chunked(slice(0, file.nbytes), PIECE_BYTES):
            bar.advance(len(file.read(piece)))
        return file.checksum


def _send(file: _Source | None, target: Path, needing: list[int], root: int, world: World) -> None:
    """Write the file on those ranks' nodes. Collective."""
    nbytes, mode = gather_json([file.nbytes, file.mode] if file else None, world=world)[root]
    with contextlib.ExitStack() as opened:
        begun, problem = None, None
        full = f"cannot write {format_bytes(nbytes)} to {target}"
        advice = "make room, or pass to=... in another folder"
        if world.rank in needing:
            try:
                begun = opened.enter_context(_Part(target, mode))
            except OSError as error:
                problem = f"{full} ({reason_of(error)}); {advice}"
        raise_together(problem, world)
        writers = _sharing_once(begun, target, needing, world)
        # Parts of the others are removed when the file is there: a client of NFS that changes a
        # folder looks at it anew, and finds the file.
        part = begun if world.rank in writers else None
        try:
            if part:
                part.claim(nbytes)
        except OSError as error:
            problem = f"{full} ({reason_of(error)}); {advice}"
        raise_together(problem, world)
        with Relay({root, *writers}, root, world, nbytes, f"copying {target.name}") as relay:
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
