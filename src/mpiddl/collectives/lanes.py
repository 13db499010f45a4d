"""Where the ranks of a node meet in shared memory: a counter each, and room for data.

A lane serves one collective at a time. Each rank has a counter in it that only grows and that
only this rank writes. A collective goes through *turns*: a rank writes what it has for a turn,
raises its counter, and waits until all counters have come as far. Whatever a rank writes in a turn
goes to one of two places by turns, so a rank may be a turn ahead of one that still reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from mpiddl.comm.windows import Window, make_fence
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer
from mpiddl.waits import Wait

__all__ = ["Foreground", "Lane", "Place", "foreground_of", "kept_lanes", "place_of"]

LINE = 64
"""Bytes that one core owns at a time: counters of two ranks never share them."""
HEADER = 3 * LINE  # the counter, then two notes
KEPT_BYTES = 64 << 10


class Place(NamedTuple):
    """Where a rank's buffer is: in which window (0: none), how far from the start of its part."""

    window: int
    offset: int


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


class _Ticket:
    """Done when the collectives that took a ticket before have left the lane."""

    __slots__ = ("_lane", "_number")

    def __init__(self, lane: Lane, number: int) -> None:
        self._lane = lane
        self._number = number

    def done(self) -> bool:
        return self._lane.served == self._number


class Lane:
    """One meeting place.

    Attributes:
        rank: This process among the ranks of the node.
        size: Ranks of the node.
        turn: The last turn that this rank has finished writing for.
        entered: Per rank, room for what goes in: two places of ``room`` bytes.
        left: Per rank, room for results: two places of a segment of ``room`` bytes.
        served: Collectives that have left the lane.
    """

    def __init__(
        self,
        world: World,
        window: Window,
        start: int,
        room: int,
        fence: Callable[[], object] | None,
    ) -> None:
        self.world = world
        self.rank, self.size = world.local_rank, world.local_size
        self.room = room
        self.fence = fence
        self.turn = 0
        self.served = 0
        self._tickets = 0
        starts = [rank * window.part_bytes + start for rank in range(self.size)]
        self.counters = memoryview(window.memory).cast("q")
        self._weights = memoryview(window.memory).cast("d")
        self.counter_at = [at // 8 for at in starts]
        self._own = self.counter_at[self.rank]
        data = torch.frombuffer(window.memory, dtype=torch.uint8)
        share = _share(room, self.size)
        self.entered = [_pair(data, at + HEADER, room) for at in starts]
        self.left = [_pair(data, at + HEADER + 2 * room, share) for at in starts]

    def ticket(self) -> Wait:
        """A place in the queue. Ranks must queue for a lane in the same order."""
        self._tickets += 1
        return _Ticket(self, self._tickets - 1)

    @property
    def idle(self) -> bool:
        """Nobody is in the lane or waits for it."""
        return self._tickets == self.served

    def leave(self) -> None:
        """The collective that is in the lane is complete on this rank."""
        self.served += 1

    def go(self) -> Wait:
        """What this rank has for the turn is written: raise the counter, wait for the others."""
        if self.fence is not None:
            self.fence()
        self.turn += 1
        self.counters[self._own] = self.turn
        return _Turn(self, self.turn)

    def note(self, place: Place, weight: float | None) -> None:
        """Tell the others, with the next turn, where the buffer is and what it weighs."""
        at = self._own + (1 + (self.turn + 1) % 2) * LINE // 8
        self.counters[at], self.counters[at + 1] = place
        self._weights[at + 2] = 1.0 if weight is None else weight
        self.counters[at + 3] = weight is not None

    def notes(self) -> tuple[list[Place], list[float] | None]:
        """What all ranks noted for the turn that is over; no weights if nobody has one."""
        ats = [at + (1 + self.turn % 2) * LINE // 8 for at in self.counter_at]
        places = [Place(self.counters[at], self.counters[at + 1]) for at in ats]
        if not any(self.counters[at + 3] for at in ats):
            return places, None
        return places, [self._weights[at + 2] for at in ats]

    def views(self, places: Sequence[Place], like: Buffer) -> list[Buffer] | None:
        """Every rank's buffer, if all are in one window; else None, on every rank."""
        memory = self.world.windows.memory(places[0].window)
        if memory is None or any(place.window != places[0].window for place in places):
            return None
        part_bytes = len(memory) // self.size
        if len(like) == 0:
            return [like] * self.size
        return [
            torch.frombuffer(
                memory, dtype=like.dtype, count=len(like), offset=rank * part_bytes + place.offset
            )
            for rank, place in enumerate(places)
        ]


class Foreground:
    """The lanes of one world, used in turn by the collectives that users start: those start in the
    same order on every rank."""

    COUNT = 4

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes
        self._next = 0

    def next(self) -> Lane:
        """The lane for the next collective."""
        lane = self._lanes[self._next]
        self._next = (self._next + 1) % self.COUNT
        return lane

    def next_idle(self) -> Lane | None:
        """The lane for the next collective if nobody is in it, else None and it is not taken."""
        return self.next() if self._lanes[self._next].idle else None


_foreground: WeakKeyDictionary[World, Foreground] = WeakKeyDictionary()


def foreground_of(world: World) -> Foreground | None:
    """The lanes for what users start on ``world``; None where the node has no shared memory."""
    if world not in _foreground:
        if world.lane_window is None:
            return None
        _foreground[world] = Foreground(_cut(world, world.lane_window, Foreground.COUNT))
    return _foreground[world]


def kept_lanes(world: World, count: int) -> list[Lane] | list[None]:
    """``count`` lanes for as long as somebody keeps them; Nones where there is no shared memory.

    Collective. There is room for small buffers; larger ones should be in windows themselves.
    """
    window = world.windows.allocate(count * KEPT_BYTES) if world.lane_window else None
    return [None] * count if window is None else _cut(world, window, count)


def _cut(world: World, window: Window, count: int) -> list[Lane]:
    """As many lanes as wanted, of equal size."""
    nbytes = window.part_bytes // count // LINE * LINE
    room = (nbytes - HEADER - 4 * LINE) * world.local_size // (2 * world.local_size + 2)
    fence = make_fence()
    return [Lane(world, window, nth * nbytes, room // LINE * LINE, fence) for nth in range(count)]


def place_of(world: World, buffer: Buffer) -> Place:
    """Where a buffer is, as other ranks can find it."""
    return Place(*world.windows.find(buffer.data_ptr()))


def _share(room: int, size: int) -> int:
    """Bytes of the largest segment of ``room`` bytes, in whole lines."""
    return -(-room // size // LINE) * LINE + LINE


def _pair(data: Buffer, start: int, nbytes: int) -> tuple[Buffer, Buffer]:
    return data[start : start + nbytes], data[start + nbytes : start + 2 * nbytes]
