"""Drives every collective in flight, from a thread of its own or from whoever comes by."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import deque
from collections.abc import Collection
from typing import Any

import torch

from mpiddl import progress
from mpiddl.comm.world import World
from mpiddl.errors import NotInitializedError
from mpiddl.log import logger
from mpiddl.overlap import watchdog
from mpiddl.overlap.work import Work
from mpiddl.waits import ALREADY, Pause, Wait, Waits

__all__ = ["PATIENCE", "Engine", "engine_of"]

PATIENCE = 100
"""Fruitless looks at a wait before others are helped on."""


class Engine:
    """All collectives of this process, of whatever world.

    One lock guards the generators and, with them, their MPI calls. A blocking call drives
    everything in flight from the caller's thread until its own collective is complete, since a
    hand-over to another thread and back costs more than a small all-reduce. Whoever waits helps
    all others on, so no order of waits can keep another rank waiting.

    Args:
        mode: ``"inline"``: collectives go on whenever a gradient becomes ready, at the end of
            backward, and in every wait. ``"thread"``: a daemon thread polls as well.
        crowded: More ranks than cores: who waits leaves the core to others at once.
    """

    def __init__(self, mode: str, crowded: bool = False) -> None:
        self.mode = mode
        self._crowded = crowded
        self._lock = threading.Lock()
        self._submitted: deque[Work] = deque()  # not seen by a poll yet; appended without the lock
        self._in_flight: list[Work] = []
        self._drivers: deque[None] = deque()  # callers that wait: the thread stands back for them
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def submit(self, waits: Waits[Any], world: World, result: Any = None) -> Work:
        """Start a collective of ``world``.

        ``result`` is what its ``wait()`` returns; default is what the generator returns.
        """
        work = Work(self, waits, world, result)
        self._submitted.append(work)
        if self.mode == "thread":
            self._start_thread()
            self._wake.set()
        else:
            self.poll()
        return work

    def run(self, waits: Waits[Any], world: World) -> Any:
        """Run a collective to its end in the caller's thread; return its result."""
        wait: Wait = ALREADY
        if self.enter():  # nothing else to help on: no need for a Work, which costs microseconds
            try:
                looks = 0
                while looks < PATIENCE:
                    if wait.done():
                        wait, looks = next(waits), 0
                    else:
                        looks += 1
                        if self._crowded:
                            os.sched_yield()
            except StopIteration as end:
                return end.value
            finally:
                self.leave()
        work = Work(self, waits, world, wait=wait)
        self._submitted.append(work)
        return work.wait()

    def enter(self) -> bool:
        """Keep the engine to the caller if nothing is in flight; then ``leave`` must follow."""
        return not (self._submitted or self._in_flight) and self._lock.acquire(blocking=False)

    def leave(self) -> None:
        """End what ``enter`` began."""
        self._lock.release()

    def poll(self) -> None:
        """Help everything in flight on by one round, unless another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._round()
            finally:
                self._lock.release()

    def drive(self, works: Collection[Work], seconds: float = math.inf) -> None:
        """Help everything in flight on until all of ``works`` are complete, or time is up."""
        pause = Pause(self._crowded)
        until = time.monotonic() + seconds
        self._drivers.append(None)
        try:
            with progress.waiting():
                while not all(work.complete for work in works) and time.monotonic() < until:
                    with self._lock:  # for one round: other threads wait for works of theirs
                        moved = self._round()
                    if moved:
                        pause.reset()
                    else:
                        pause()
        finally:
            self._drivers.pop()
            self._wake.set()

    def abandon(self, world: World) -> None:
        """Forget the collectives of a world that closes."""
        with self._lock:
            self._collect()
            left = [work for work in self._in_flight if work.world is world]
            self._in_flight = [work for work in self._in_flight if work.world is not world]
            for work in left:
                work.give_up(NotInitializedError("its world was closed before it was complete"))
        if left:
            logger.warning("%d collectives were never waited for; call work.wait()", len(left))

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _collect(self) -> None:
        while self._submitted:
            self._in_flight.append(self._submitted.popleft())

    def _round(self) -> bool:
        """Advance every work once; True if any went on. Under the lock."""
        self._collect()
        moved = False
        try:
            for work in self._in_flight:
                moved |= work.advance()
        finally:
            self._in_flight = [work for work in self._in_flight if not work.complete]
        if moved:
            progress.moved()
        return moved

    def _start_thread(self) -> None:
        if self._thread is None:
            # A daemon, so that a rank which fails is not kept from exiting.
            self._thread = threading.Thread(target=self._loop, name="mpiddl-engine", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        # Each thread that calls torch gets an OpenMP pool of its own; this one only adds.
        torch.set_num_threads(1)
        # A user's buffer may have been made in inference mode, and autograd has no part in this.
        with torch.inference_mode():
            self._poll_until_stopped()

    def _poll_until_stopped(self) -> None:
        pause = Pause(self._crowded)
        while not self._stopping:
            if self._drivers or not (self._in_flight or self._submitted):
                self._wake.wait()
                self._wake.clear()
                pause.reset()
                continue
            with self._lock:
                moved = self._round()
            if moved:
                pause.reset()
            else:
                pause()


_engine: Engine | None = None


def engine_of(world: World) -> Engine:
    """The engine of this process, for collectives of ``world``; made at the first call.

    Raises:
        NotInitializedError: ``world`` was closed.
    """
    global _engine
    world.check_open()
    if _engine is None:
        _engine = Engine(_mode(world), world.layout.crowded)
        watchdog.start(world)
        atexit.register(_engine.stop)  # before MPI's own finalizer
    world.at_close(_engine.abandon)
    return _engine


def _mode(world: World) -> str:
    """Inline where threads may not share MPI, or where nothing else was asked for.

    On CPUs a thread takes the cycles that it is meant to save: computing ranks own their cores.
    """
    wanted = world.settings.engine
    if wanted == "thread" and not world.allows_threads:
        logger.warning("this MPI grants no MPI_THREAD_MULTIPLE: the engine runs inline")
        return "inline"
    return "inline" if wanted == "auto" else wanted
