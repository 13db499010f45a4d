"""How long calls take that all ranks make together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from mpiddl.base.waits import Wait

__all__ = ["nothing", "seconds_of", "wait_for"]


def nothing() -> None:
    """On the host a call is over when it returns."""


def wait_for(wait: Wait) -> None:
    """Return once ``wait`` is done: at once, so never asleep."""
    while not wait.done():
        os.sched_yield()  # with more ranks than cores another one may need this core


def seconds_of(
    call: Callable[[], Any],
    calls: int,
    barrier: Callable[[], Any],
    fresh: torch.Tensor | None,
    settle: Callable[[], Any] = nothing,
) -> float:
    """Seconds per call, from a barrier on until the results can be used.

    ``fresh`` is written before each call, outside of the time, and each call has a barrier of its
    own: as a gradient that backward has just written. ``settle`` returns once the device has done
    all that it was asked: a GPU's call returns before that.
    """
    if fresh is None:
        settle()
        barrier()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        settle()
        return (time.perf_counter() - started) / calls
    seconds = 0.0
    for _ in range(calls):
        fresh.zero_()
        settle()
        barrier()
        started = time.perf_counter()
        call()
        settle()
        seconds += time.perf_counter() - started
    return seconds / calls
