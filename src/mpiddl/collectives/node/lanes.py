"""Which lane a collective takes: users' collectives in turn, a gradient bucket its own."""

from __future__ import annotations

from mpiddl.collectives.node.lane import LINE, Lane, Place
from mpiddl.comm.windows import Window, make_fence
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, Device

__all__ = ["Foreground", "foreground_of", "is_mapped", "kept_lanes", "lend", "place_of"]

KEPT_BYTES = 64 << 10
LEAST_KEPT_BYTES = 4 << 10
ALL_KEPT_BYTES = 4 << 20
"""Of many lanes each has less room."""


class Foreground:
    """The lanes of one world, used in turn by the collectives that users start: those start in the
    same order on every rank."""

    COUNT = 4

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        self._next = 0

    def next(self) -> Lane:
        """The lane for the next collective."""
        lane = self.lanes[self._next]
        self._next = (self._next + 1) % self.COUNT
        return lane

    def next_idle(self) -> Lane | None:
        """The lane for the next collective if nobody is in it, else None and it is not taken."""
        return self.next() if self.lanes[self._next].idle else None


def foreground_of(world: World) -> Foreground | None:
    """The lanes for what users start on ``world``; None where the node has no shared memory."""
    return world.service(_make_foreground)


def _make_foreground(world: World) -> Foreground | None:
    if world.lane_window is None:
        return None
    return Foreground(_cut(world, world.lane_window, Foreground.COUNT))


def kept_lanes(world: World, count: int) -> list[Lane] | list[None]:
    """``count`` lanes for as long as somebody keeps them; Nones where there is no shared memory.

    Collective. There is room for small buffers; larger ones should be in windows themselves.
    """
    nbytes = min(KEPT_BYTES, max(LEAST_KEPT_BYTES, ALL_KEPT_BYTES // max(1, count)))
    window = world.windows.allocate(count * nbytes) if world.lane_window else None
    return [None] * count if window is None else _cut(world, window, count)


def _cut(world: World, window: Window, count: int) -> list[Lane]:
    """As many lanes as wanted, of equal size."""
    nbytes = window.part_bytes // count // LINE * LINE
    fence = make_fence()
    return [Lane(world, window, number, nbytes, fence) for number in range(count)]


def place_of(world: World, buffer: Buffer, device: Device) -> Place:
    """Where a buffer is, as other ranks can find it."""
    address = buffer.data_ptr()
    return Place(*device.mapped(world).find(address), address)


def lend(buffer: Buffer, lane: Lane, device: Device) -> Place:
    """Let the others go to ``buffer`` until this rank leaves ``lane``: where it is."""
    lane.lend(buffer)
    return place_of(lane.world, buffer, device)


def is_mapped(buffer: Buffer, device: Device, world: World) -> bool:
    """Whether a buffer is in a window: on every rank of its node, if on one."""
    return not len(buffer) or device.mapped(world).find(buffer.data_ptr())[0] != 0
