"""The short way for blocking all-reduces on one node.

The same turns in the same lane as ``collectives/node/shared.py``, so other ranks may take either
way; but what is known from the call before is not worked out again, and where nobody is late,
buffers that are small or in windows need neither a generator nor a queue: these cost more than to
add.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from mpiddl.base.segments import split
from mpiddl.base.waits import Waits
from mpiddl.collectives.choose import choose
from mpiddl.collectives.node.lane import NOWHERE, Lane, Place
from mpiddl.collectives.node.lanes import Foreground, foreground_of
from mpiddl.collectives.node.node_buffers import InWindow, Weights, in_turn, meet, pieces_of
from mpiddl.collectives.node.shared import SMALL_BYTES, finish, shared_all_reduce, show
from mpiddl.collectives.reduction import DTYPES, reduction_of
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer
from mpiddl.devices.host import HOST
from mpiddl.engine.engine import PATIENCE, Engine, engine_of
from mpiddl.errors import UnsupportedBufferError

__all__ = ["ShortWay", "short_way_of"]

MOST_PLANS = 1024
MOST_MET = 64

_copy = ctypes.memmove


class _Plan(NamedTuple):
    """A reduction of one op, dtype and length, as far as it is the same for all tensors.

    Attributes:
        op: sum, min, max or prod.
        nbytes: Size of one buffer in bytes.
        weight: The weight of every rank, if it is the same.
        weights: That weight once for each rank.
        shown: Per lane and place: where all ranks show their buffers, and this rank's address;
            empty for large buffers, None until it is first used.
        met: How buffers are reduced, by what all ranks noted about them; None: not in one piece,
            or not all in one window.
    """

    op: str
    nbytes: int
    weight: float | None
    weights: list[float] | None
    shown: list[list[tuple[list[Buffer], int] | None]]
    met: dict[tuple[bytes, ...], _Met | None]


class _Met(NamedTuple):
    """Buffers in windows, of which this rank adds one piece.

    Attributes:
        parts: The piece in the buffer of every rank.
        targets: The same pieces, this rank's first.
        weights: The weight of every rank.
    """

    parts: list[Buffer]
    targets: list[Buffer]
    weights: Weights


class ShortWay:
    """Blocking all-reduces of one world."""

    def __init__(self, world: World, foreground: Foreground, engine: Engine) -> None:
        self._world = world
        self._foreground = foreground
        self._engine = engine
        self._next_tag = world.tags.foreground
        self._tuned = world.tuned
        self._plans: dict[tuple[str, torch.dtype, int], _Plan | None] = {}

    def all_reduce(self, tensor: Any, op: str) -> bool:
        """Reduce ``tensor`` if it can go this way; False if nothing was done."""
        if (
            type(tensor) is not torch.Tensor
            or tensor.layout is not torch.strided
            or not tensor.is_contiguous()
            or not tensor.is_cpu
            or tensor.requires_grad
            or tensor.is_inference()
            or tensor.is_neg()
        ):
            return False
        if self._tuned is not self._world.tuned:  # then the long way goes by another table, too
            self._tuned = self._world.tuned
            self._plans.clear()
        key = (op, tensor.dtype, tensor.numel())
        try:
            plan = self._plans[key]
        except KeyError:
            plan = self._plan(*key)
        if plan is None or not self._engine.enter():
            return False
        try:
            lane = self._foreground.next_idle()
            if lane is None:
                return False
            self._next_tag()  # as on the long way, which other ranks may take
            buffer = tensor if tensor.dim() == 1 else tensor.view(-1)
            if plan.shown:
                parity = (lane.turn + 1) & 1
                shown, own_address = plan.shown[lane.number][parity] or _show(
                    plan, lane, parity, buffer
                )
                _copy(own_address, tensor.data_ptr(), plan.nbytes)
                place = NOWHERE
            else:
                place = show(buffer, lane, HOST)
            turn = lane.enter(place, plan.weight)
            rest: Waits[Any] | None = None
            # Whatever adds does so under the lock: scratch is not for two threads.
            if not lane.has_come(turn, PATIENCE):
                rest = _finish_late(buffer, plan.op, lane, turn)
            elif plan.shown:
                HOST.combine(plan.op, shown, plan.weights, [buffer])
                lane.leave()
            else:
                rest = self._after_first_turn(buffer, plan, lane, place)
        finally:
            self._engine.leave()
        if rest is not None:  # another rank is late: help on whatever else is in flight
            self._engine.run(rest, self._world)
        return True

    def _after_first_turn(
        self, buffer: Buffer, plan: _Plan, lane: Lane, place: Place
    ) -> Waits[Any] | None:
        """As ``finish``; in windows, where all is known from another time, at once. Returns what is
        left to do."""
        if not place.window:
            return finish(buffer, plan.op, lane, HOST)
        key = tuple(lane.notes_as_bytes())
        try:
            met = plan.met[key]
        except KeyError:
            if len(plan.met) >= MOST_MET:
                plan.met.clear()
            met = plan.met[key] = _meet(buffer, lane)
        if met is None:
            return finish(buffer, plan.op, lane, HOST)
        HOST.combine(plan.op, met.parts, met.weights, met.targets)
        turn = lane.raise_counter()
        if not lane.has_come(turn, PATIENCE):
            return _leave_late(lane, turn)
        lane.leave()
        return None

    def _plan(self, op: str, dtype: torch.dtype, length: int) -> _Plan | None:
        """Make and keep a plan; None where the long way is right, or has something to say."""
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        plan = self._plans[op, dtype, length] = self._prepare(op, dtype, length)
        return plan

    def _prepare(self, op: str, dtype: torch.dtype, length: int) -> _Plan | None:
        if dtype not in DTYPES:
            return None
        nbytes, size = length * dtype.itemsize, self._world.size
        try:
            chosen = choose("auto", dtype, nbytes, self._world)
            reduction = reduction_of(op, dtype, size)
        except (ValueError, UnsupportedBufferError):
            return None
        if chosen.algorithm.run is not shared_all_reduce:
            return None
        lanes = self._foreground.lanes if nbytes <= SMALL_BYTES else []
        weight = reduction.weight
        weights = None if weight is None else [weight] * size
        return _Plan(reduction.op, nbytes, weight, weights, [[None, None] for _ in lanes], {})


def _show(plan: _Plan, lane: Lane, parity: int, like: Buffer) -> tuple[list[Buffer], int]:
    views = lane.shown(like, parity)
    shown = plan.shown[lane.number][parity] = views, views[lane.rank].data_ptr()
    return shown


def _finish_late(buffer: Buffer, op: str, lane: Lane, turn: int) -> Waits[None]:
    yield lane.all_at(turn)
    yield from finish(buffer, op, lane, HOST)


def _leave_late(lane: Lane, turn: int) -> Waits[None]:
    yield lane.all_at(turn)
    lane.leave()


def _meet(buffer: Buffer, lane: Lane) -> _Met | None:
    """The one piece that this rank reduces; None if there are more, or buffers out of windows."""
    places, weights = lane.notes()
    meeting = meet(lane, places, weights, buffer, HOST)
    segment = split(len(buffer), lane.size)[lane.rank]
    pieces = pieces_of(segment, buffer.itemsize, lane.size, HOST)
    if not isinstance(meeting, InWindow) or len(pieces) > 1:
        return None
    parts = meeting.parts_of(segment)
    return _Met(parts, in_turn(parts, lane.rank), weights)


def short_way_of(world: World) -> ShortWay | None:
    """The short way on ``world``; None where there is none."""
    return world.service(_make)


def _make(world: World) -> ShortWay | None:
    settings = world.settings
    foreground = foreground_of(world) if world.num_nodes == 1 else None
    allowed = settings.algorithm == "auto" and not settings.check
    return ShortWay(world, foreground, engine_of(world)) if foreground and allowed else None
