"""Memory that others may still read or write, though nobody here waits for them any more.

A collective can be given up in the middle: its world closes, an exception leaves it, or the program
ends. MPI, the ranks of this node and the GPU go on with the addresses that they were told.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable

__all__ = ["forget_one", "keep_until"]

_kept: deque[tuple[Callable[[], bool], object]] = deque()
# MPI's finalizer comes after the interpreter's, and messages may arrive until then.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))


def keep_until(done: Callable[[], bool], owner: object) -> None:
    """Keep ``owner``, whose memory is in use, until ``done()``.

    Calls nothing, so that finalizers may call it in any thread. What they pass must not have a
    finalizer itself: those of a cycle run together, and once.
    """
    _kept.append((done, owner))


def forget_one() -> None:
    """Ask after the memory that was not asked after for longest. Where MPI may be called."""
    if _kept:
        done, owner = _kept.popleft()
        if not done():
            _kept.append((done, owner))
