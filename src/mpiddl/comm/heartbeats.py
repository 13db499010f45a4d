"""What the ranks of a node tell each other without messages: that they live, and what they do."""

from __future__ import annotations

import enum
import struct
import time
from typing import NamedTuple

from mpiddl.comm.windows import Window, Windows

__all__ = ["Beat", "Heartbeats", "State"]

_BEAT = struct.Struct("<qqqq")  # written at, state, waits for (both in nanoseconds), bytes of words
_ROOM = 4096 - _BEAT.size


class State(enum.IntEnum):
    """What a rank does."""

    STARTS = 0
    RUNS = 1
    WAITS = 2
    GAVE_UP = 3
    """Its watchdog has said why and is about to end the job."""
    LEFT = 4
    """Its program has ended."""


class Beat(NamedTuple):
    """A sign of life.

    Attributes:
        at: CLOCK_MONOTONIC, which the ranks of a node share, in nanoseconds.
        state: What the rank does.
        stuck: Nanoseconds that it has waited while nothing moved.
        words: The same and more for people; may be torn while it is being written.
    """

    at: int
    state: State
    stuck: int
    words: str


class Heartbeats:
    """A place for each rank of a node, which it writes and all read.

    Args:
        window: Its parts hold ``Heartbeats.NBYTES``.
        own: The place of this rank.
        size: Ranks of the node.
    """

    NBYTES = 4096

    def __init__(self, window: Window, own: int, size: int) -> None:
        self._memory = memoryview(window.memory)
        self._starts = [rank * window.part_bytes for rank in range(size)]
        self._own = self._starts[own]

    @classmethod
    def among(cls, windows: Windows, own: int, size: int) -> Heartbeats | None:
        """Of the ranks of this node; None without shared memory. Collective over the world."""
        window = windows.allocate(cls.NBYTES)
        return None if window is None else cls(window, own, size)

    def write(self, state: State, stuck: int = 0, words: str = "") -> None:
        """Say that this rank lives."""
        text = words.encode()[:_ROOM]
        start = self._own + _BEAT.size
        self._memory[start : start + len(text)] = text
        _BEAT.pack_into(self._memory, self._own, time.monotonic_ns(), state, stuck, len(text))

    def read(self) -> list[Beat]:
        """What each rank of the node said last."""
        return [self._read(start) for start in self._starts]

    def _read(self, start: int) -> Beat:
        at, state, stuck, nbytes = _BEAT.unpack_from(self._memory, start)
        text = bytes(self._memory[start + _BEAT.size : start + _BEAT.size + nbytes])
        return Beat(at, State(state), stuck, text.decode(errors="replace"))
