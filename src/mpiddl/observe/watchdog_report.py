"""What a rank says when the job is stuck."""

from __future__ import annotations

import linecache
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mpiddl.base.units import format_seconds
from mpiddl.observe.event_words import in_words
from mpiddl.observe.events import recorder
from mpiddl.observe.heartbeats import Beat, State
from mpiddl.observe.job import Job

__all__ = ["described", "lines", "summary"]

MOST_FRAMES = 20
MOST_FAR = 32
MOST_WAITING = 3
"""Ranks that wait like this one and are described in full; those that are late all are."""

_OWN_FOLDER = str(Path(__file__).parents[1])
_PLACE = re.compile(r"at ([^;]+):(\d+) in ([^;]+)$")

Describers = Sequence[Callable[[], str]]


def summary(describers: Describers) -> str:
    """What this rank does, in one line. Asked every second: it touches no file."""
    return "; ".join(part for part in (described(describers), _last(), _place()) if part)


def described(describers: Describers) -> str:
    """What this rank's models do, in one line."""
    words = []
    for describe in describers:
        try:
            words.append(describe())
        except Exception as error:  # it looks at what other threads change; a report all the same
            words.append(f"(no description: {error!r})")
    return "; ".join(text for text in words if text)


def lines(
    job: Job,
    beats: Sequence[Beat],
    lost: Sequence[int],
    describers: Describers,
    alive_seconds: float,
) -> list[str]:
    """The report of this rank, after its first line.

    Args:
        job: The ranks that the report names.
        beats: The last sign of life of each rank of this node.
        lost: The places, in ``beats``, of ranks whose processes are gone.
        describers: Say what this rank's models do.
        alive_seconds: A rank that has been silent for longer may be stopped or dead.
    """
    text = [part for part in (described(describers), _last()) if part]
    text += ["its main thread is at:"]
    frames = list(islice(_main_frames(), MOST_FRAMES))
    text += [f"  {_with_source(frame)}" for frame in reversed(frames)]
    ranks = job.neighbours
    if len(beats) == len(ranks):
        others = [pair for pair in zip(ranks, beats, strict=True) if pair[0] != job.rank]
        waiting = [pair for pair in others if pair[1].stuck and _silence(pair[1]) < alive_seconds]
        shown = [pair for pair in others if pair not in waiting[MOST_WAITING:]]
        gone = {ranks[place] for place in lost}
        text += [_of(rank, beat, alive_seconds, rank in gone) for rank, beat in shown]
        if len(shown) < len(others):
            text += [f"{len(others) - len(shown)} more ranks of this node wait too"]
    if len(job.nodes) > 1:
        far = [f"{rank} on {host}" for rank, host in enumerate(job.hosts) if rank not in ranks]
        more = f" and {len(far) - MOST_FAR} more" if len(far) > MOST_FAR else ""
        who = f"rank {', '.join(far[:MOST_FAR])}{more}"
        text += [f"not seen from here: {who}; a rank that reports nothing itself is late"]
    return text


def _of(rank: int, beat: Beat, alive_seconds: float, gone: bool) -> str:
    silent = _silence(beat)
    if gone:
        said = f"rank {rank} is gone since {format_seconds(silent)}"
    elif beat.state is State.LEFT:
        said = f"rank {rank} is not there: its program has ended"
    elif beat.state is State.STARTS:
        said = f"rank {rank} has called no collective yet"
    elif silent > alive_seconds:
        said = (
            f"rank {rank} is late: no sign of life for {format_seconds(silent)} (stopped, killed, "
            "or in code that keeps Python's lock)"
        )
    elif beat.stuck:
        said = f"rank {rank} waits too, since {format_seconds(beat.stuck / 1e9)}"
    else:
        said = f"rank {rank} is late: it does not wait"
    return f"{said}; {_PLACE.sub(_with_source_of, beat.words)}" if beat.words else said


def _silence(beat: Beat) -> float:
    return (time.monotonic_ns() - beat.at) / 1e9


def _last() -> str:
    """The last thing that this rank did."""
    for event in recorder.last(1):
        ago = format_seconds((time.monotonic_ns() - event.at) / 1e9)
        return f"last, {ago} ago, it {in_words(event, recorder.about)}"
    return "it has done nothing yet"


class _Frame(NamedTuple):
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def _main_frames() -> Iterator[_Frame]:
    """Where the main thread is, the innermost frame first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield _Frame(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name)
        frame = frame.f_back


def _with_source(frame: _Frame) -> str:
    """The frame and its line of code, for which the file is read."""
    return f"{frame}: {linecache.getline(frame.file, frame.line).strip()}"


def _with_source_of(place: re.Match[str]) -> str:
    return f"at {_with_source(_Frame(place[1], int(place[2]), place[3]))}"


def _place() -> str:
    """Where the main thread is: the innermost line that is not of mpiddl or torch."""
    for frame in _main_frames():
        if not frame.file.startswith(_OWN_FOLDER) and "/torch/" not in frame.file:
            return f"at {frame}"
    return ""
