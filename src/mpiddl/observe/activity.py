"""Whether this process waits for other ranks, and whether anything moves meanwhile.

The marks that a watchdog goes by. They are set by whatever blocks and cost next to nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from mpiddl.errors import NestedCallError

__all__ = [
    "begin_driving",
    "end_driving",
    "is_waiting",
    "moved",
    "moves",
    "refuse_nested",
    "waiting",
]

_driver = 0  # the thread that drives collectives just now
_waiting: deque[None] = deque()  # appending and popping cannot be interrupted by another thread
_moves = 0


@contextmanager
def waiting() -> Iterator[None]:
    """The caller waits for other ranks until it leaves.

    Raises:
        NestedCallError: It is itself part of a collective.
    """
    refuse_nested()
    _waiting.append(None)
    try:
        yield
    finally:
        _waiting.pop()
        moved()


def begin_driving() -> None:
    """This thread drives collectives: nothing else can, so what they call must not wait."""
    global _driver
    _driver = get_ident()


def end_driving() -> None:
    """What ``begin_driving`` began is over."""
    global _driver
    _driver = 0


def refuse_nested() -> None:
    """Raise NestedCallError if a collective that this thread drives has called the caller."""
    if _driver == get_ident():
        raise NestedCallError


def is_waiting() -> bool:
    """Whether some thread of this process waits for other ranks."""
    return bool(_waiting)


def moved() -> None:
    """Something that is waited for went on."""
    global _moves
    _moves += 1  # two threads may count as one: a change all the same


def moves() -> int:
    """A number that changes whenever something goes on."""
    return _moves
