"""Events: how the host learns how far a stream has come, and one stream waits for another."""

from __future__ import annotations

from mpiddl.devices.cuda.runtime import Runtime

__all__ = ["Event", "Events"]


class Event:
    """A place in a stream's work. A Wait: done once the stream has come there."""

    __slots__ = ("_events", "_happened", "_number")

    def __init__(self, events: Events, number: int) -> None:
        self._events = events
        self._number = number
        self._happened = False

    def done(self) -> bool:
        self._happened = self._happened or self._events.runtime.happened(self._number)
        return self._happened

    def hold_up(self, stream: int) -> None:
        """What ``stream`` is asked from now on comes after this event. Does not block."""
        if not self._happened:
            self._events.runtime.let_wait(stream, self._number)

    def __del__(self) -> None:
        # Streams that wait for it keep what they need of it: CUDA waits for a recorded state.
        self._events.free.append(self._number)


class Events:
    """Makes events, which are used again: to create one costs as much as to record ten.

    Attributes:
        free: Those that nobody has.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.free: list[int] = []

    def after(self, stream: int) -> Event:
        """Happens when all that ``stream`` was asked so far has."""
        try:
            number = self.free.pop()
        except IndexError:
            number = self.runtime.make_event()
        event = Event(self, number)
        self.runtime.record(number, stream)
        return event
