"""Files of events: one a rank, mapped into its memory, so that SIGKILL loses nothing.

    header        magic, version, where events begin, how many fit
    description   twice: sequence, length, checksum, JSON; the newer one that is whole counts
    events        a ring, see observe/events.py

The file is sparse. What is written through the mapping is backed by real blocks first, since
touching what the disk cannot hold would end the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpiddl.base.locks import lock
from mpiddl.errors import RecordingError
from mpiddl.observe.events import EVENT, LAST_EVENTS, Event, Kind, Recorder

if TYPE_CHECKING:
    import numpy

__all__ = ["TRACE_EVENTS", "EventFile", "Recording", "in_use", "read"]

TRACE_EVENTS = 4 << 20
"""Events of a trace: 128 MiB. After that the oldest are overwritten."""

_MAGIC = b"mpiddl\0e"
_VERSION = 1
_HEADER = struct.Struct("<8sIIqq")  # magic, version, bytes of an event, start of events, capacity
_DESCRIPTION = struct.Struct("<QII")  # sequence, bytes, crc32
_ROOM = 2 << 20  # for each of the two descriptions
_DESCRIPTIONS = (4096, 4096 + _ROOM)
_EVENTS = 4096 + 2 * _ROOM
_PIECE = 1 << 20  # bytes of events that are backed at a time


class EventFile:
    """A rank's events, written through a mapping.

    Args:
        path: A file of this name is replaced; whoever has that one open keeps it.
        capacity: Events that fit.

    Raises:
        OSError: The file cannot be made, or the disk is full.
    """

    def __init__(self, path: Path, capacity: int = LAST_EVENTS) -> None:
        self.path = path
        self._capacity = capacity
        self._sequence = 0
        path.unlink(missing_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            lock(self._file, fcntl.LOCK_SH)
            os.ftruncate(self._file, _EVENTS + capacity * EVENT.size)
            self._write_header()
            self._backed = self._back(LAST_EVENTS)
            memory = mmap.mmap(self._file, 0)
        except OSError:
            path.unlink()
            os.close(self._file)
            raise
        self._events = memoryview(memory)[_EVENTS:]

    def take_over(self, recorder: Recorder) -> None:
        """From now on ``recorder`` writes to this file."""
        recorder.move(self._events, lambda: self.describe(recorder.about), self._grow)
        self.describe(recorder.about)

    def describe(self, about: dict[str, Any]) -> None:
        """Replace the description. What is too long loses its parameters' names."""
        text = json.dumps(about).encode()
        if len(text) > _ROOM - _DESCRIPTION.size:
            text = json.dumps({**about, "models": {}}).encode()
        self._sequence += 1
        head = _DESCRIPTION.pack(self._sequence, len(text), zlib.crc32(text))
        with contextlib.suppress(OSError):  # a full disk: the one before still counts
            os.pwrite(self._file, head + text, _DESCRIPTIONS[self._sequence % 2])

    def _write_header(self) -> None:
        header = _HEADER.pack(_MAGIC, _VERSION, EVENT.size, _EVENTS, self._capacity)
        os.pwrite(self._file, header, 0)

    def _back(self, events: int) -> int:
        """Have the disk hold this many events; returns how many it holds."""
        nbytes = min(-(-events * EVENT.size // _PIECE) * _PIECE, self._capacity * EVENT.size)
        os.posix_fallocate(self._file, _EVENTS, nbytes)
        return nbytes // EVENT.size

    def _grow(self, events: int) -> int:
        if events > self._backed:
            try:
                self._backed = self._back(min(events, self._backed + (_PIECE // EVENT.size)))
            except OSError:  # full: the ring ends here
                self._capacity = self._backed
                self._write_header()
        return self._backed


def in_use(path: Path) -> bool:
    """Whether the process that writes a file of events lives, as far as its lock tells."""
    with path.open("rb") as file:
        try:
            lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Recording:
    """What a file of events says.

    Attributes:
        path: The file.
        about: The description; empty where none is whole.
        events: Oldest first, a structured numpy array with the fields of ``events.Event``.
        lost: Events that were overwritten by later ones.
        problems: What is wrong with the file, in words.
    """

    def __init__(
        self,
        path: Path,
        about: dict[str, Any],
        events: numpy.ndarray[Any, Any],
        lost: int,
        problems: list[str],
    ) -> None:
        self.path = path
        self.about = about
        self.events = events
        self.lost = lost
        self.problems = problems


def read(path: Path) -> Recording:
    """Read a file of events, also one that is being written or whose writer was killed.

    Raises:
        RecordingError: It cannot be opened, or is no such file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None
    if len(content) < _HEADER.size or content[: len(_MAGIC)] != _MAGIC:
        raise RecordingError(f"{path} is not a recording of mpiddl")
    _, version, event_bytes, start, capacity = _HEADER.unpack_from(content)
    if (version, event_bytes) != (_VERSION, EVENT.size):
        raise RecordingError(
            f"{path} has format {version}, this mpiddl reads format {_VERSION}; read it with the "
            "mpiddl that wrote it"
        )
    if start != _EVENTS or capacity < 1:
        raise RecordingError(f"{path} is damaged: its header makes no sense")
    problems = []
    if len(content) < start + capacity * EVENT.size:
        problems.append("it is truncated: events are missing")
    about = _description_in(content)
    if not about:
        problems.append("its description is missing: ranks and parameters have no names")
    events, lost, damaged = _events_in(content[start:], capacity)
    if damaged:
        problems.append(f"{damaged} events are damaged and left out")
    return Recording(path, about, events, lost, problems)


def _description_in(content: bytes) -> dict[str, Any]:
    found: dict[int, dict[str, Any]] = {0: {}}
    for start in _DESCRIPTIONS:
        if len(content) < start + _DESCRIPTION.size:
            continue
        sequence, nbytes, checksum = _DESCRIPTION.unpack_from(content, start)
        text = content[start + _DESCRIPTION.size : start + _DESCRIPTION.size + nbytes]
        if sequence and len(text) == nbytes and zlib.crc32(text) == checksum:
            with contextlib.suppress(ValueError):
                about = json.loads(text)
                if isinstance(about, dict):
                    found[sequence] = about
    return found[max(found)]


def _events_in(content: bytes, capacity: int) -> tuple[numpy.ndarray[Any, Any], int, int]:
    """Events in order, how many were overwritten, how many are damaged."""
    import numpy

    fields = zip(Event._fields, ("<i8", "<i2", "<i2", "<i4", "<i8", "<i8"), strict=True)
    count = min(len(content) // EVENT.size, capacity)
    ring = numpy.frombuffer(content, numpy.dtype(list(fields)), count)
    places = numpy.flatnonzero(ring["number"])
    written = ring[places]
    whole = (written["number"] > 0) & (written["number"] % capacity == places)
    whole &= (written["kind"] >= min(Kind)) & (written["kind"] <= max(Kind))
    damaged = len(written) - int(whole.sum())
    events = numpy.sort(written[whole], order="number")
    if not len(events):
        return events, 0, damaged
    # The oldest of a full ring may be half overwritten by one that was never finished.
    newest = int(events["number"][-1])
    events = events[events["number"] > newest - capacity + 1]
    return events, max(0, newest - capacity + 1), damaged
