"""How far the clocks of the nodes are apart."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence

from mpiddl.base.waits import Wait
from mpiddl.comm.layout import Layout
from mpiddl.comm.messages import Messages

__all__ = ["offsets_of_nodes"]

ROUNDS = 10


def offsets_of_nodes(messages: Messages, layout: Layout, rank: int) -> tuple[int, int]:
    """What to add to this node's CLOCK_MONOTONIC for rank 0's, and the error, in nanoseconds.

    Collective; the answer is good on the first rank of each node, 0 on the others. Of a few
    round trips the shortest counts: it leaves the least room for error. No other message of
    this world may be in flight.
    """
    firsts = [ranks[0] for ranks in layout.nodes]
    if rank == 0:
        for first in firsts[1:]:
            _answer(messages, first)
    elif rank in firsts:
        return _ask(messages)
    return 0, 0


def _answer(messages: Messages, peer: int) -> None:
    now = ctypes.c_int64()
    for _ in range(ROUNDS):
        _complete(messages.receive(ctypes.addressof(now), 8, peer, 0, now))
        now.value = time.monotonic_ns()
        _complete(messages.send(ctypes.addressof(now), 8, peer, 0, now))


def _ask(messages: Messages) -> tuple[int, int]:
    theirs = ctypes.c_int64()
    trips: list[tuple[int, int]] = []  # how long it took, the offset
    for _ in range(ROUNDS):
        before = time.monotonic_ns()
        _complete(messages.send(ctypes.addressof(theirs), 8, 0, 0, theirs))
        _complete(messages.receive(ctypes.addressof(theirs), 8, 0, 0, theirs))
        after = time.monotonic_ns()
        trips.append((after - before, theirs.value - (before + after) // 2))
    return _best(trips)


def _best(trips: Sequence[tuple[int, int]]) -> tuple[int, int]:
    shortest, offset = min(trips)
    return offset, shortest // 2


def _complete(wait: Wait) -> None:
    while not wait.done():
        os.sched_yield()
