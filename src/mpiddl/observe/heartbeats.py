"""What the ranks of a node tell each other without messages: that they live, and what they do."""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

__all__ = ["Beat", "Heartbeats", "State", "process_name"]

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
        memory: Memory that the ranks of the node share; zero at first.
        part_bytes: Each rank's part of it, at least ``Heartbeats.NBYTES``.
        own: The place of this rank.
        processes: What each rank of the node said with ``process_name()``.
    """

    NBYTES = 4096

    def __init__(
        self, memory: mmap.mmap, part_bytes: int, own: int, processes: Sequence[tuple[int, int]]
    ) -> None:
        self._memory = memoryview(memory)
        self._starts = [rank * part_bytes for rank in range(len(processes))]
        self._own = self._starts[own]
        self._processes = [_process(*name) for name in processes]

    def is_gone(self, place: int) -> bool:
        """Whether the process of that rank of the node is known to have ended."""
        process = self._processes[place]
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        return True

    def write(self, state: State, stuck: int = 0, words: str = "") -> None:
        """Say that this rank lives."""
        text = words.encode()[:_ROOM]
        start = self._own + _BEAT.size
        self._memory[start : start + len(text)] = text
        _BEAT.pack_into(self._memory, self._own, time.monotonic_ns(), state, stuck, len(text))

    def leave(self) -> None:
        """Say that this rank's program ends, unless that was said already, in more words."""
        if self._read(self._own).state is not State.LEFT:
            self.write(State.LEFT)

    def read(self) -> list[Beat]:
        """What each rank of the node said last."""
        return [self._read(start) for start in self._starts]

    def _read(self, start: int) -> Beat:
        at, state, stuck, nbytes = _BEAT.unpack_from(self._memory, start)
        text = bytes(self._memory[start + _BEAT.size : start + _BEAT.size + nbytes])
        return Beat(at, State(state), stuck, text.decode(errors="replace"))


def process_name() -> tuple[int, int]:
    """This process's number, and the PID namespace in which it has that number; 0: unknown."""
    with contextlib.suppress(OSError):
        return os.getpid(), os.stat("/proc/self/ns/pid").st_ino
    return os.getpid(), 0


def _process(number: int, namespace: int) -> psutil.Process | None:
    """A process of this node; None where it cannot be told apart, as in another container."""
    if namespace == 0 or namespace != process_name()[1]:
        return None
    with contextlib.suppress(psutil.Error):
        return psutil.Process(number)
    return None
