"""The handle of one collective."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mpiddl.base.waits import ALREADY, Wait, Waits
from mpiddl.comm.kept import keep_until
from mpiddl.devices.base import Device
from mpiddl.devices.host import HOST
from mpiddl.observe.events import Kind, record

if TYPE_CHECKING:
    from mpiddl.comm.world import World

__all__ = ["Label", "Work", "keep_while_working"]


class Label(NamedTuple):
    """The bucket that a work reduces, as events name it."""

    model: int
    bucket: int
    nbytes: int


class _Engine(Protocol):
    """Drives works."""

    def poll(self) -> None:
        """Help everything in flight on by one round."""

    def drive(self, works: Collection[Work]) -> None:
        """Help everything in flight on until all of ``works`` are complete."""


class Work:
    """A collective in flight, or complete.

    Made by calls with ``async_=True``. The buffer must be left alone until ``wait()`` returns.

    Attributes:
        world: The ranks of the collective.
        priority: Works with higher ones are advanced first.
        threaded: Whether the engine's thread polls it too.
        seconds: Time from its start to its end, once it is complete.
    """

    def __init__(
        self,
        engine: _Engine,
        waits: Waits[Any],
        world: World,
        result: Any = None,
        wait: Wait = ALREADY,
        *,
        priority: int = 0,
        threaded: bool = False,
        label: Label | None = None,
        device: Device = HOST,
    ) -> None:
        self.world = world
        self._device = device
        self.priority = priority
        self.threaded = threaded
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._label = label
        self._engine = engine
        self._waits = waits
        self._wait = wait
        self._result = result
        self._error: BaseException | None = None
        self._complete = False

    def done(self) -> bool:
        """Whether the collective is complete; never blocks, and helps it on."""
        if not self._complete:
            self._engine.poll()
        return self._complete

    def wait(self) -> Any:
        """Block until the collective is complete; return its result.

        For an all-reduce that is the tensor or array that was passed. An error that the
        collective met is raised here.
        """
        if not self._complete:
            self._engine.drive([self])
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def complete(self) -> bool:
        """Whether the collective is complete, without helping it on."""
        return self._complete

    def give_up(self, error: BaseException) -> None:
        """Never to be advanced again; ``wait`` raises ``error``. Engine only."""
        self._error = error
        self._complete = True
        keep_while_working(self._device, self)

    def advance(self, most: int) -> int:
        """Run the generator as far as it goes, at most so many turns; how many. Engine only."""
        turns = 0
        if self._complete:
            return turns
        try:
            while turns < most and self._wait.done():
                turns += 1
                self._wait = next(self._waits)
        except StopIteration as end:
            self._result = end.value if self._result is None else self._result
            self.seconds = time.perf_counter() - self._started
            if self._label is not None:
                record(Kind.COMPLETE, *self._label)
            self._complete = True
        except BaseException as error:
            turns += 1  # of its last, which may have been in done()
            self.give_up(error)
            if not isinstance(error, Exception):  # Ctrl-C: also for whoever happened to poll
                raise
        return turns


def keep_while_working(device: Device, given_up: object) -> None:
    """Keep ``given_up``, which holds memory that ``device`` was told to work on, until it has."""
    if device.late:
        with suppress(Exception):  # a GPU that fails works on nothing, and its error comes first
            keep_until(device.fence().done, given_up)
