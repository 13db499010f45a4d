"""What a collective waits for, and how to run one.

A collective is a generator: straight-line code that yields a ``Wait`` wherever it cannot go
on, and is resumed once that wait is done. Whoever runs it decides how to wait: the engine polls
many generators in turn, and blocks by polling until one of them is complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable
from typing import Protocol, TypeVar

__all__ = ["ALREADY", "AllOf", "Already", "Pause", "Queue", "Wait", "Waits", "in_turn"]

T = TypeVar("T")


class Wait(Protocol):
    """Something that is done now or later. Asking must be cheap and never blocks."""

    def done(self) -> bool: ...


Waits = Generator[Wait, None, T]
"""A collective: yields what it waits for, returns its result."""


class Already:
    """Done from the start: an empty message, a collective of one rank."""

    def done(self) -> bool:
        return True


ALREADY = Already()


class AllOf:
    """Done when every one of ``waits`` is."""

    def __init__(self, waits: Iterable[Wait]) -> None:
        self._open = list(waits)

    def done(self) -> bool:
        self._open = [wait for wait in self._open if not wait.done()]
        return not self._open


class Queue:
    """Those who take a ticket are served one after the other, in that order.

    Attributes:
        served: How many have left.
    """

    def __init__(self) -> None:
        self._tickets = 0
        self.served = 0

    def ticket(self) -> Wait:
        """Done when all that took one before have left."""
        self._tickets += 1
        number = self._tickets - 1
        return ALREADY if self.served == number else _Ticket(self, number)

    @property
    def idle(self) -> bool:
        """Nobody is served or waits for it."""
        return self._tickets == self.served

    def leave(self) -> None:
        """The one that is served makes room for the next."""
        self.served += 1


class _Ticket:
    __slots__ = ("_number", "_queue")

    def __init__(self, queue: Queue, number: int) -> None:
        self._queue = queue
        self._number = number

    def done(self) -> bool:
        return self._queue.served == self._number


def in_turn(queue: Queue, waits: Waits[T]) -> Waits[T]:
    """``waits``, which begin when all have begun that came here before, whenever somebody asks."""
    ticket = queue.ticket()

    def begun() -> Waits[T]:
        yield ticket
        queue.leave()
        return (yield from waits)

    return begun()


class Pause:
    """Back-off between fruitless polls: spin, then yield the core, then sleep.

    MPI's own "yield when idle" does not reach loops outside MPI, and a spinning rank on an
    oversubscribed node holds the core that its peer needs to send what it waits for.

    Args:
        crowded: The node is oversubscribed: yield at once.
    """

    SPINS = 20
    YIELDS = 2000
    SLEEP_SECONDS = 50e-6

    def __init__(self, crowded: bool = False) -> None:
        self._first = self.SPINS if crowded else 0
        self._fruitless = self._first

    def reset(self) -> None:
        """Progress was made: the next pause is short again."""
        self._fruitless = self._first

    def __call__(self) -> None:
        self._fruitless += 1
        if self._fruitless > self.YIELDS:
            time.sleep(self.SLEEP_SECONDS)
        elif self._fruitless > self.SPINS:
            os.sched_yield()
