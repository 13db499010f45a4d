"""The buffers of one collective on one node, as one rank reads and writes them all.

They are one set of memory where all are in a window; else the kernel copies to and fro.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpiddl.base.segments import chunked
from mpiddl.collectives.node.lane import Lane, Place
from mpiddl.comm.peer_memory import Reach
from mpiddl.devices.base import Buffer, Device

__all__ = ["InWindow", "Meeting", "Weights", "in_turn", "meet", "pieces_of"]

IN_CACHE_BYTES = 4 << 20
"""What is combined must be in the caches still when it is handed out: all ranks' pieces of it."""
LEAST_PIECE_BYTES = 512 << 10
"""Each piece costs a view, and calls of the kernel, for every rank."""

Weights = Sequence[float] | None


class Meeting(Protocol):
    """All buffers of a node."""

    def combine(self, piece: slice, op: str) -> None:
        """Make ``piece`` of this rank's buffer the reduction of all ranks', in rank order."""
        ...

    def reduce(self, piece: slice, op: str) -> None:
        """Both: ``combine``, and what it gave to all."""
        ...

    def hand_out(self, piece: slice) -> None:
        """Copy ``piece`` of this rank's buffer into all others."""
        ...


def in_turn(parts: Sequence[Buffer], rank: int) -> list[Buffer]:
    """This rank's part, then those of the ranks after it: ranks do not all begin with one peer."""
    return [*parts[rank:], *parts[:rank]]


def pieces_of(segment: slice, itemsize: int, ranks: int, device: Device) -> list[slice]:
    """Parts of a segment that are combined, then handed out, one after the other."""
    if not device.in_cache:
        return [segment]
    nbytes = max(LEAST_PIECE_BYTES, IN_CACHE_BYTES // ranks)
    return chunked(segment, nbytes // itemsize)


def meet(
    lane: Lane, places: Sequence[Place], weights: Weights, buffer: Buffer, device: Device
) -> Meeting | None:
    """The buffers at ``places``; None, on every rank, if they cannot be reached."""
    if places[0].window and all(place.window == places[0].window for place in places):
        return InWindow(lane, places, weights, buffer, device)
    if lane.world.reach is not None and not device.late:
        return _Apart(lane.rank, lane.world.reach, places, weights, buffer, device)
    return None


class InWindow:
    """Everyone's memory is this rank's memory."""

    def __init__(
        self,
        lane: Lane,
        places: Sequence[Place],
        weights: Weights,
        buffer: Buffer,
        device: Device,
    ) -> None:
        self._lane = lane
        self._places = tuple(places)
        self._weights = weights
        self._buffer = buffer
        self._device = device

    def combine(self, piece: slice, op: str) -> None:
        parts = self.parts_of(piece)
        self._device.combine(op, parts, self._weights, [parts[self._lane.rank]])

    def reduce(self, piece: slice, op: str) -> None:
        parts = self.parts_of(piece)
        self._device.combine(op, parts, self._weights, in_turn(parts, self._lane.rank))

    def hand_out(self, piece: slice) -> None:
        mine, *others = in_turn(self.parts_of(piece), self._lane.rank)
        for other in others:
            self._device.copy(other, mine)

    def parts_of(self, piece: slice) -> list[Buffer]:
        """Everyone's ``piece``. The views do not keep the window; this rank's buffer does."""
        dtype, first, last = self._buffer.dtype, piece.start, piece.stop
        key = (self._places, dtype, first, last)
        parts = self._lane.cached.get(key)
        if parts is None:
            offsets = [place.offset + first * dtype.itemsize for place in self._places]
            windows = self._device.mapped(self._lane.world)
            parts = windows.views(self._places[0].window, offsets, last - first, dtype)
            self._lane.remember(key, parts)
        return parts


class _Apart:
    """The kernel copies between processes."""

    def __init__(
        self,
        rank: int,
        reach: Reach,
        places: Sequence[Place],
        weights: Weights,
        buffer: Buffer,
        device: Device,
    ) -> None:
        self._rank = rank
        self._reach = reach
        self._peers = [(peer, place.address) for peer, place in enumerate(places) if peer != rank]
        self._weights = weights
        self._buffer = buffer
        self._device = device

    def combine(self, piece: slice, op: str) -> None:
        mine = self._buffer[piece]
        start = piece.start * mine.itemsize
        with self._device.scratch(len(self._peers) * len(mine), mine.dtype) as scratch:
            parts = list(scratch.view(len(self._peers), len(mine)))
            for part, (peer, address) in zip(parts, self._peers, strict=True):
                self._reach.read(part.data_ptr(), mine.nbytes, peer, address + start)
            parts.insert(self._rank, mine)
            self._device.combine(op, parts, self._weights, [mine])

    def reduce(self, piece: slice, op: str) -> None:
        self.combine(piece, op)
        self.hand_out(piece)

    def hand_out(self, piece: slice) -> None:
        mine = self._buffer[piece]
        start = piece.start * mine.itemsize
        for peer, address in self._peers:
            self._reach.write(mine.data_ptr(), mine.nbytes, peer, address + start)
