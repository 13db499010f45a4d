"""How long calls take that all ranks make together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["seconds_of"]


def seconds_of(
    call: Callable[[], Any], calls: int, barrier: Callable[[], Any], fresh: torch.Tensor | None
) -> float:
    """Seconds per call, from a barrier on.

    ``fresh`` is written before each call, outside of the time, and each call has a barrier of its
    own: as a gradient that backward has just written.
    """
    if fresh is None:
        barrier()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) / calls
    seconds = 0.0
    for _ in range(calls):
        fresh.zero_()
        barrier()
        started = time.perf_counter()
        call()
        seconds += time.perf_counter() - started
    return seconds / calls
