"""Drives every collective in flight, from its own thread or from any rank's thread that waits."""

from __future__ import annotations

import atexit
import os
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import torch

from mpiddl.base.log import logger
from mpiddl.base.waits import ALREADY, Pause, Wait, Waits
from mpiddl.comm.gpus import use_gpu
from mpiddl.comm.world import World
from mpiddl.devices.base import Device
from mpiddl.devices.host import HOST
from mpiddl.engine.work import Label, Work, keep_while_working
from mpiddl.errors import NotInitializedError
from mpiddl.observe import activity, watchdog

__all__ = ["PATIENCE", "Engine", "engine_of", "may_thread"]

PATIENCE = 100
"""Fruitless looks at a wait before others are helped on."""

TURNS = 16
"""Of one collective, before those that are more urgent are asked again: a few chunks."""


class Engine:
    """All collectives of this process, of whatever world.

    One lock guards the generators and, with them, their MPI calls. A blocking call drives
    everything in flight from the caller's thread until its own collective is complete, since a
    hand-over to another thread and back costs more than a small all-reduce. Whoever waits helps
    all others on, so no order of waits can keep another rank waiting.

    Inline, collectives go on whenever a gradient becomes ready, at the end of backward, and in
    every wait. Works that are ``threaded`` are polled by a daemon thread as well.

    Args:
        threaded: Whether works are threaded that do not say.
        crowded: There are more ranks than cores, so a rank that waits yields its core at once.
        torch_threads: Number of torch threads that the engine's thread adds with.
        gpu: Number of the GPU that the thread works on, as torch counts; None: none.
    """

    NUDGE_SECONDS = 100e-6
    """Nudges are not closer together: hooks of small gradients come every few microseconds, and to
    look at everything in flight costs as much."""

    def __init__(
        self,
        threaded: bool = False,
        crowded: bool = False,
        torch_threads: int = 1,
        gpu: int | None = None,
    ) -> None:
        self._gpu = gpu
        self._threaded = threaded
        self._crowded = crowded
        self._torch_threads = torch_threads
        self._lock = threading.Lock()
        self._submitted: deque[Work] = deque()  # not seen by a poll yet; appended without the lock
        self._in_flight: list[Work] = []  # the most urgent first
        self._polled = 0.0
        self._drivers: deque[None] = deque()  # callers that wait: the thread stands back for them
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def submit(
        self,
        waits: Waits[Any],
        world: World,
        result: Any = None,
        *,
        priority: int = 0,
        threaded: bool | None = None,
        label: Label | None = None,
        device: Device = HOST,
        after: Wait = ALREADY,
    ) -> Work:
        """Start a collective of ``world``.

        Args:
            waits: The collective.
            world: The ranks of the collective.
            result: The value that its ``wait()`` returns; default: the generator's own result.
            priority: Works with higher ones are polled first, and post their chunks first.
            threaded: Whether the engine's thread polls it too; default on GPUs, where it may.
            label: The bucket under which its end is recorded.
            device: The device whose memory the caller leaves to it until ``wait()`` returns.
            after: The collective begins once this wait is done; for callers without a device.
        """
        if device.late:
            waits, after = _to_the_end(waits, device), device.settled()
        if threaded is None:  # a GPU's first message goes after a fence: somebody must come by
            may = world.settings.engine != "inline" and world.allows_threads
            threaded = self._threaded or (device.late and may)
        work = Work(
            self,
            waits,
            world,
            result,
            after,
            priority=priority,
            threaded=threaded,
            label=label,
            device=device,
        )
        self._submitted.append(work)
        if threaded:
            self._start_thread()
            self._wake.set()
        else:
            self.poll()
        return work

    def run(self, waits: Waits[Any], world: World, device: Device = HOST) -> Any:
        """Run a collective to its end in the caller's thread; return its result.

        ``device`` is the device whose memory the caller leaves to it.
        """
        result = self._run(waits, world, device)
        device.hand_back()
        return result

    def _run(self, waits: Waits[Any], world: World, device: Device) -> Any:
        wait = device.settled()
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
            except BaseException as error:
                keep_while_working(device, error)
                raise
            finally:
                self.leave()
        activity.refuse_nested()
        work = Work(self, waits, world, wait=wait, device=device)
        self._submitted.append(work)
        return work.wait()

    def enter(self) -> bool:
        """Keep the engine to the caller if nothing is in flight; then ``leave`` must follow."""
        if self._submitted or self._in_flight or not self._lock.acquire(blocking=False):
            return False
        activity.begin_driving()
        return True

    def leave(self) -> None:
        """End what ``enter`` began."""
        activity.end_driving()
        self._lock.release()

    @property
    def nudge_is_due(self) -> bool:
        """Whether something is in flight and no poll was a moment ago."""
        return bool(self._in_flight) and time.perf_counter() - self._polled >= self.NUDGE_SECONDS

    def nudge(self) -> None:
        """Poll, if that is due."""
        if self.nudge_is_due:
            self.poll()

    def poll(self) -> None:
        """Help everything in flight on by one round, unless another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._round()
            finally:
                self._lock.release()

    def drive(self, works: Collection[Work], enough: Callable[[], bool] = lambda: False) -> None:
        """Help everything in flight on until all of ``works`` are complete, or it is ``enough``."""
        pause = Pause(self._crowded)
        self._drivers.append(None)
        try:
            with activity.waiting():
                while not (all(work.complete for work in works) or enough()):
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
            insort(self._in_flight, self._submitted.popleft(), key=_urgency)

    def _round(self) -> bool:
        """Advance every work as far as it goes; True if any went on. Under the lock.

        One whose peers keep up goes far: meanwhile those that are more urgent are asked again.
        """
        self._collect()
        place = gone = 0
        moved = True  # also after an exception: its work is over
        activity.begin_driving()
        try:
            while place < len(self._in_flight):
                turns = self._in_flight[place].advance(TURNS)
                gone += turns
                place += 1
                if turns == TURNS:
                    self._collect()
                    place = 0
            moved = gone > 0
        finally:
            activity.end_driving()
            if moved:
                self._in_flight = [work for work in self._in_flight if not work.complete]
            self._polled = time.perf_counter()
        if moved:
            activity.moved()
        return moved

    def _start_thread(self) -> None:
        if self._thread is None:
            # A daemon, so that a rank which fails is not kept from exiting.
            self._thread = threading.Thread(target=self._loop, name="mpiddl-engine", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        # Each thread that calls torch gets an OpenMP pool of its own; this one only adds.
        torch.set_num_threads(self._torch_threads)
        if self._gpu is not None:  # MPI looks for the GPU of the thread that calls it
            use_gpu(self._gpu)
        # A user's buffer may have been made in inference mode, and autograd has no part in this.
        with torch.inference_mode():
            self._poll_until_stopped()

    def _poll_until_stopped(self) -> None:
        pause = Pause(self._crowded)
        while not self._stopping:
            if self._drivers or not self._any_threaded():
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

    def _any_threaded(self) -> bool:
        return bool(self._submitted) or any(work.threaded for work in self._in_flight)


def _to_the_end(waits: Waits[Any], device: Device) -> Waits[Any]:
    """``waits``, and what they last asked of ``device``: until then its memory is kept, also where
    the caller has dropped both buffer and work."""
    result = yield from waits
    yield device.fence()
    return result


def _urgency(work: Work) -> int:
    return -work.priority


_engine: Engine | None = None


def engine_of(world: World) -> Engine:
    """The engine of this process, for collectives of ``world``; made at the first call.

    Raises:
        NotInitializedError: ``world`` was closed.
    """
    global _engine
    world.check_open()
    if _engine is None:
        _engine = Engine(
            threaded=may_thread(world) and world.settings.engine == "thread",
            crowded=world.layout.crowded,
            torch_threads=world.settings.engine_threads,
            gpu=world.device.index if world.on_gpu else None,
        )
        watchdog.start()
        atexit.register(_engine.stop)  # before MPI's own finalizer
    world.at_close(_engine.abandon)
    return _engine


def may_thread(world: World) -> bool:
    """Whether the engine may have a thread; where one was asked for in vain, says so."""
    if world.settings.engine == "thread" and not world.allows_threads:
        logger.warning("this MPI grants no MPI_THREAD_MULTIPLE: the engine runs inline")
    return world.allows_threads
