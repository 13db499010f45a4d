"""Drives every collective in flight, from a thread of its own or from whoever comes by."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Collection
from typing import Any

import torch

from mpiddl.comm.world import World
from mpiddl.log import logger
from mpiddl.overlap.work import Work
from mpiddl.waits import Pause, Waits

__all__ = ["Engine", "engine_of"]


class Engine:
    """All collectives of one world.

    One lock guards the generators and, with them, all MPI calls: MPI_THREAD_SERIALIZED is
    enough. A blocking call takes the lock in the caller's thread and drives everything in
    flight until its own collective is complete, since a hand-over to another thread and back
    costs more than a small all-reduce.

    Args:
        mode: ``"inline"``: collectives go on whenever a gradient becomes ready, at the end of
            backward, and in every wait. ``"thread"``: a daemon thread polls as well.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._lock = threading.Lock()
        self._submitted: deque[Work] = deque()  # not seen by a poll yet; appended without the lock
        self._in_flight: list[Work] = []
        self._drivers: deque[None] = deque()  # callers that want the lock: the thread stands back
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def submit(self, waits: Waits[Any], result: Any = None) -> Work:
        """Start a collective. ``result`` is what its ``wait()`` returns (default: its own)."""
        work = Work(self, waits, result)
        self._submitted.append(work)
        if self.mode == "thread":
            self._start_thread()
            self._wake.set()
        else:
            self.poll()
        return work

    def run(self, waits: Waits[Any]) -> Any:
        """Run a collective to its end in the caller's thread; return its result."""
        work = Work(self, waits)
        self._submitted.append(work)
        return work.wait()

    def poll(self) -> None:
        """Help everything in flight on by one round, unless another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._round()
            finally:
                self._lock.release()

    def drive(self, works: Collection[Work]) -> None:
        """Help everything in flight on until all of ``works`` are complete."""
        if all(work.complete for work in works):
            return
        self._drivers.append(None)
        try:
            with self._lock:
                pause = Pause()
                while True:
                    moved = self._round()
                    if all(work.complete for work in works):
                        return
                    if moved:
                        pause.reset()
                    else:
                        pause()
        finally:
            self._drivers.pop()
            self._wake.set()

    def stop(self) -> None:
        """End the thread and wait for it. Works that are not complete are abandoned."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        left = len(self._in_flight) + len(self._submitted)
        if left:
            logger.warning("%d collectives were never waited for; call work.wait()", left)
            self._in_flight.clear()
            self._submitted.clear()

    def _round(self) -> bool:
        """Advance every work once; True if any went on. Under the lock."""
        while self._submitted:
            self._in_flight.append(self._submitted.popleft())
        moved = False
        for work in self._in_flight:
            moved |= work.advance()
        if moved:
            self._in_flight = [work for work in self._in_flight if not work.complete]
        return moved

    def _start_thread(self) -> None:
        if self._thread is None:
            # A daemon, so that a rank which fails is not kept from exiting.
            self._thread = threading.Thread(target=self._loop, name="mpiddl-engine", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        # Each thread that calls torch gets an OpenMP pool of its own; this one only adds.
        torch.set_num_threads(1)
        pause = Pause()
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


_engines: weakref.WeakKeyDictionary[World, Engine] = weakref.WeakKeyDictionary()


def engine_of(world: World) -> Engine:
    """The engine that drives ``world``'s collectives; made at the first call."""
    world.check_open()
    engine = _engines.get(world)
    if engine is None:
        engine = _engines[world] = Engine(_mode(world))
        atexit.register(engine.stop)  # before MPI's own finalizer
        world.at_close(engine.stop)
        world.at_close(lambda: atexit.unregister(engine.stop))
    return engine


def _mode(world: World) -> str:
    """Inline where threads may not share MPI, or where nothing else was asked for.

    On CPUs a thread takes the cycles that it is meant to save: computing ranks own their cores.
    """
    wanted = world.settings.engine
    if wanted == "thread" and not world.allows_threads:
        logger.warning("this MPI grants no MPI_THREAD_SERIALIZED: the engine runs inline")
        return "inline"
    return "inline" if wanted == "auto" else wanted
