"""No hang: who waits too long, or in vain, says for what, and ends the job.

A thread of its own looks every now and then whether this rank waits for others and nothing
moves. It makes no MPI calls, for MPI may be what is stuck. The ranks of a node see each other's
state in shared memory, so that a rank that is waited for says where it is, too, and one that has
died without a word is missed within seconds.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable

from mpiddl.base.units import format_seconds
from mpiddl.launch.exit import end_process
from mpiddl.observe import activity, flight_recorder
from mpiddl.observe import watchdog_report as report
from mpiddl.observe.events import Kind, recorder
from mpiddl.observe.heartbeats import Beat, State
from mpiddl.observe.job import Job

__all__ = ["Watchdog", "start", "watch"]

FIRST_STEP_FACTOR = 3
"""Before the first step is done others may load data and compile for longer."""
GRACE_SECONDS = 5.0
"""After the report, for the reports of others."""
LAST_WORDS_SECONDS = 0.5
VAIN_SECONDS = 5.0
"""How long nothing moves where all ranks wait, but those whose programs have ended."""
STATUS = 1


class Watchdog:
    """Ends the job when this rank waits and nothing has moved for ``timeout`` seconds.

    Time counts only while somebody waits and while this process runs: a suspended machine, or a
    long evaluation on all ranks, is no reason.

    Args:
        job: The ranks that reports name.
        timeout: Seconds; three times as many until the first backward is complete; infinite where
            only lost ranks matter.
    """

    def __init__(self, job: Job, timeout: float) -> None:
        self._job = job
        self._timeout = timeout
        self._tick = min(1.0, timeout / 10)
        self._stuck = 0.0  # seconds in which this rank waited and nothing moved
        self._signs = (-1, -1)
        self._looked = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mpiddl-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This process leaves: nobody need wait for it."""
        self._stopping.set()
        self._thread.join()
        self._tell(State.LEFT, report.described(_describers()))

    def _run(self) -> None:
        self.look()
        while not self._stopping.wait(self._tick):
            self.look()

    def look(self) -> None:
        """Once: count, tell the others, act if it is time."""
        self._count()
        state = State.WAITS if activity.is_waiting() else State.RUNS
        self._tell(state, report.summary(_describers()))  # may be the last: ranks can be stopped
        beats = self._beats()
        lost = self._lost(beats)
        if lost:
            who = ", ".join(f"rank {self._job.neighbours[place]}" for place in lost)
            self._end_job(f"misses {who}: its process is gone (killed, or ended by a library)")
        elif self._waits_in_vain(beats):
            self._end_job("waits, as all do that are left: nobody can come any more")
        elif self._stuck >= self._limit():
            self._end_job(f"{self._waited()} ({self._setting()})")
        elif any(beat.state is State.GAVE_UP for beat in beats):
            self._end_job(self._waited() if activity.is_waiting() else "is waited for")

    def _lost(self, beats: list[Beat]) -> list[int]:
        """Ranks of this node, by place, that have gone without a farewell."""
        heartbeats = flight_recorder.heartbeats()
        if heartbeats is None:
            return []
        quiet_since = time.monotonic_ns() - int(2e9 * self._tick)
        return [
            place
            for place, beat in enumerate(beats)
            if beat.state < State.GAVE_UP and beat.at < quiet_since and heartbeats.is_gone(place)
        ]

    def _waits_in_vain(self, beats: list[Beat]) -> bool:
        """Whether the ranks that are left all wait, for long, and all are on this node."""
        if len(self._job.nodes) > 1 or self._stuck < VAIN_SECONDS:
            return False
        left = [beat for beat in beats if beat.state is not State.LEFT]
        return len(left) < len(beats) and all(beat.stuck >= VAIN_SECONDS * 1e9 for beat in left)

    def _count(self) -> None:
        now, signs = time.monotonic(), (activity.moves(), recorder.count)
        # After a suspension the clock has jumped, but nobody had time to move.
        passed = min(now - self._looked, 2 * self._tick)
        idle = activity.is_waiting() and signs == self._signs
        self._stuck = self._stuck + passed if idle else 0.0
        self._looked, self._signs = now, signs

    def _limit(self) -> float:
        stepped = recorder.latest[Kind.BACKWARD_END] > 0
        return self._timeout * (1 if stepped else FIRST_STEP_FACTOR)

    def _tell(self, state: State, words: str) -> None:
        heartbeats = flight_recorder.heartbeats()
        if heartbeats is not None:
            heartbeats.write(state, int(self._stuck * 1e9), words)

    def _beats(self) -> list[Beat]:
        heartbeats = flight_recorder.heartbeats()
        return [] if heartbeats is None else heartbeats.read()

    def _waited(self) -> str:
        return f"has waited for {format_seconds(self._stuck)} and nothing moved"

    def _setting(self) -> str:
        setting = f"MPIDDL_TIMEOUT is {format_seconds(self._timeout)}"
        if not recorder.latest[Kind.BACKWARD_END]:
            setting += f", {FIRST_STEP_FACTOR} times that before the first step is complete"
        return setting

    def _end_job(self, why: str) -> None:
        """Report, let others report, leave. MPI is not asked: it may never answer."""
        job = self._job
        who = f"rank {job.rank} of {job.size} on {job.host}"
        text = [f"mpiddl: {who} {why}; ending the job"]
        beats = self._beats()
        lost = self._lost(beats)
        text += report.lines(job, beats, lost, _describers(), 5 * self._tick)
        text += [flight_recorder.hint()]
        self._tell(State.GAVE_UP, report.summary(_describers()))
        _say("\n  ".join(text) + "\n")
        self._wait_for_others()
        end_process(STATUS)

    def _wait_for_others(self) -> None:
        until = time.monotonic() + min(GRACE_SECONDS, max(1.0, self._timeout))
        while time.monotonic() < until and not self._all_have_spoken():
            time.sleep(0.05)
        time.sleep(LAST_WORDS_SECONDS)

    def _all_have_spoken(self) -> bool:
        alive_since = time.monotonic_ns() - int(5e9 * self._tick)
        beats = self._beats()
        lost = self._lost(beats)
        on_this_node = all(
            beat.state >= State.GAVE_UP or beat.at < alive_since or place in lost
            for place, beat in enumerate(beats)
        )
        return on_this_node and len(self._job.nodes) == 1


def _say(text: str) -> None:
    """Write to stderr without the locks that a stuck thread may hold."""
    # What the program has printed would be lost, but to write it may block.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)
    os.write(2, text.encode())


_watched: list[weakref.WeakMethod[Callable[[], str]]] = []
_watching = threading.Lock()  # over the list, between the thread that looks and those that add
_watchdog: Watchdog | None = None


def watch(describe: Callable[[], str]) -> None:
    """Have ``describe`` asked what its object does when a rank is stuck or waited for.

    Args:
        describe: A method; its object may go. Called from another thread while the object is in
            use, it must not wait for anything. Returns one line, or nothing.
    """
    with _watching:
        _watched.append(weakref.WeakMethod(describe))


def _describers() -> list[Callable[[], str]]:
    with _watching:
        _watched[:] = [reference for reference in _watched if reference() is not None]
        return [describe for reference in _watched if (describe := reference()) is not None]


def start() -> None:
    """Watch over this rank of the current job from now on; once, however often called."""
    global _watchdog
    job = flight_recorder.current_job()
    if _watchdog is None and job is not None and job.size > 1:
        _watchdog = Watchdog(job, job.timeout or math.inf)
        atexit.register(_watchdog.stop)
