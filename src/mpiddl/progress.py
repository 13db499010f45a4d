"""Whether this process waits for other ranks, and whether anything moves meanwhile.

The marks that a watchdog goes by. They are set by whatever blocks and cost next to nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_waiting", "moved", "moves", "waiting"]

_waiting: deque[None] = deque()  # appending and popping cannot be interrupted by another thread
_moves = 0


@contextmanager
def waiting() -> Iterator[None]:
    """The caller waits for other ranks until it leaves."""
    _waiting.append(None)
    try:
        yield
    finally:
        _waiting.pop()
        moved()


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
