"""Where the ranks of a node meet in shared memory: a counter each, and room for data.

A lane serves one collective at a time. Each rank has a counter in it that only grows and that
only this rank writes. A collective goes through *turns*: a rank writes what it has for a turn,
raises its counter, and waits until all counters have come as far. Whatever a rank writes in a turn
goes to one of two places by turns, so a rank may be a turn ahead of one that still reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from mpiddl.base.waits import Queue, Wait
from mpiddl.comm.kept import keep_until
from mpiddl.comm.windows import Window
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, as_dtype

__all__ = ["LINE", "NOWHERE", "Lane", "Place"]

LINE = 64
"""Bytes that one core owns at a time: counters of two ranks never share them."""
HEADER = 3 * LINE  # the counter, then two notes
NOTE = 40  # bytes: window, offset, address, weight, whether there is one
MOST_CACHED = 1024


class Place(NamedTuple):
    """Where a rank's buffer is.

    Attributes:
        window: The window that it is in, 0 for none.
        offset: Bytes from the start of the rank's part of that window.
        address: In the memory of its process.
    """

    window: int
    offset: int
    address: int


NOWHERE = Place(0, 0, 0)


class _Turn:
    """Done when every counter has come to ``turn``."""

    __slots__ = ("_lane", "_turn", "_waiting")

    def __init__(self, lane: Lane, turn: int) -> None:
        self._lane = lane
        self._turn = turn
        self._waiting = 0  # peers before this one have come

    def done(self) -> bool:
        lane = self._lane
        while self._waiting < lane.size:
            if lane.counters[lane.counter_at[self._waiting]] < self._turn:
                return False
            self._waiting += 1
        if lane.fence is not None:
            lane.fence()
        return True


class Lane(Queue):
    """One meeting place, and the queue for it: ranks must queue in the same order.

    Args:
        world: Whose ranks on this node meet.
        window: In each rank's part there is room for this lane and others.
        number: This lane among those of the window.
        nbytes: Of a lane.
        fence: What ``comm.windows.make_fence`` returned.

    Attributes:
        rank: This process among the ranks of the node.
        size: Ranks of the node.
        crowded: More ranks than cores: each turn costs a switch between ranks.
        turn: The last turn that this rank has finished writing for.
        room: Bytes that a rank can show in a turn.
        entered: Per rank, room for what goes in: two places of ``room`` bytes.
        left: Per rank, room for results: two places of a segment of ``room`` bytes.
        counters: All ranks' counters and notes, as 8-byte integers.
        counter_at: Index of each rank's counter.
        cached: Views that were made before.
    """

    def __init__(
        self,
        world: World,
        window: Window,
        number: int,
        nbytes: int,
        fence: Callable[[], object] | None,
    ) -> None:
        super().__init__()
        start, room = number * nbytes, _room_in(nbytes, world.local_size)
        self.number = number
        self.world = world
        self.rank, self.size = world.layout.place, world.local_size
        self.room = room
        self.fence = fence
        self.crowded = world.layout.crowded
        self.turn = 0
        starts = [rank * window.part_bytes + start for rank in range(self.size)]
        self.counters = memoryview(window.memory).cast("q")
        self._weights = memoryview(window.memory).cast("d")
        self._bytes = memoryview(window.memory).cast("B")
        self.counter_at = [at // 8 for at in starts]
        self._own = self.counter_at[self.rank]
        self._peers_at = [at for at in self.counter_at if at != self._own]
        self._noted: list[tuple[Place, float | None] | None] = [None, None]
        self._lent: tuple[int, Buffer] | None = None
        with torch.inference_mode(mode=False):  # or it could not be written outside of that mode
            data = torch.frombuffer(window.memory, dtype=torch.uint8)
        share = _share(room, self.size)
        self.entered = [_pair(data, at + HEADER, room) for at in starts]
        self.left = [_pair(data, at + HEADER + 2 * room, share) for at in starts]
        self.cached: dict[object, list[Buffer]] = {}

    def lend(self, buffer: Buffer) -> None:
        """The others may go to ``buffer`` from the next turn on, until this rank leaves."""
        self._lent = self.turn + 1, buffer

    def leave(self) -> None:
        super().leave()
        self._lent = None

    def __del__(self) -> None:
        if self._lent is not None:  # given up in the middle: they go there until the turn is over
            turn, buffer = self._lent
            keep_until(lambda: self.has_come(turn + 1, 0), buffer)

    def raise_counter(self) -> int:
        """What this rank has for the turn is written. Returns the turn."""
        if self.fence is not None:
            self.fence()
        self.turn = turn = self.turn + 1
        self.counters[self._own] = turn
        return turn

    def go(self) -> Wait:
        """What this rank has for the turn is written: raise the counter, wait for the others."""
        return _Turn(self, self.raise_counter())

    def enter(self, place: Place, weight: float | None) -> int:
        """Ticket, note and counter of an idle lane in one. Returns the turn."""
        self._tickets += 1
        parity = (self.turn + 1) & 1
        if self._noted[parity] != (place, weight):
            self.note(place, weight)
        return self.raise_counter()

    def has_come(self, turn: int, looks: int) -> bool:
        """Whether all ranks come to ``turn`` within so many looks at their counters."""
        counters = self.counters
        for at in self._peers_at:
            while counters[at] < turn:
                looks -= 1
                if looks < 0:
                    return False
                if self.crowded:
                    os.sched_yield()
        if self.fence is not None:
            self.fence()
        return True

    def all_at(self, turn: int) -> Wait:
        """Done when all ranks have come to ``turn``."""
        return _Turn(self, turn)

    def note(self, place: Place, weight: float | None) -> None:
        """Tell the others, with the next turn, where the buffer is and what it weighs."""
        parity = (self.turn + 1) % 2
        self._noted[parity] = place, weight
        at = self._own + (1 + parity) * LINE // 8
        self.counters[at], self.counters[at + 1], self.counters[at + 2] = place
        self._weights[at + 3] = 1.0 if weight is None else weight
        self.counters[at + 4] = weight is not None

    def notes(self) -> tuple[list[Place], list[float] | None]:
        """What all ranks noted for the turn that is over; no weights if nobody has one."""
        counters, line = self.counters, (1 + self.turn % 2) * LINE // 8
        places, weights, weighted = [], [], False
        for rank_at in self.counter_at:
            at = rank_at + line
            places.append(Place(counters[at], counters[at + 1], counters[at + 2]))
            weights.append(self._weights[at + 3])
            weighted = weighted or counters[at + 4] != 0
        return places, weights if weighted else None

    def notes_as_bytes(self) -> list[bytes]:
        """The same unread, to tell whether they are those of another time."""
        line = (1 + self.turn % 2) * LINE
        memory = self._bytes
        return [bytes(memory[8 * at + line : 8 * at + line + NOTE]) for at in self.counter_at]

    def shown(self, like: Buffer, place: int) -> list[Buffer]:
        """Every rank's ``entered`` in ``place``, as buffers like ``like``."""
        key = (place, like.dtype, len(like))
        views = self.cached.get(key)
        if views is None:
            views = [as_dtype(pair[place][: like.nbytes], like.dtype) for pair in self.entered]
            self.remember(key, views)
        return views

    def remember(self, key: object, views: list[Buffer]) -> None:
        """Keep ``views`` in ``cached``: to make them costs more than to add small ones."""
        if len(self.cached) >= MOST_CACHED:
            self.cached.clear()
        self.cached[key] = views


def _room_in(nbytes: int, size: int) -> int:
    """The ``room`` of a lane for which each of ``size`` ranks has ``nbytes``."""
    room = (nbytes - HEADER - 4 * LINE) * size // (2 * size + 2)
    return room // LINE * LINE


def _share(room: int, size: int) -> int:
    """Bytes of the largest segment of ``room`` bytes, in whole lines."""
    return -(-room // size // LINE) * LINE + LINE


def _pair(data: Buffer, start: int, nbytes: int) -> tuple[Buffer, Buffer]:
    return data[start : start + nbytes], data[start + nbytes : start + 2 * nbytes]
