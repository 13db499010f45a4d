"""All-reduce on one node: every rank adds its segment, straight from and into all buffers.

With three ranks and segments a b c:

    rank 0 reads a of all three buffers, adds, and writes the sum into all three
    rank 1 the same for b
    rank 2 the same for c

No message is on the path: ranks meet in a lane. Buffers in a window, on the host or on a GPU, are
used where they are. Other host buffers are reached through the kernel, or, where that is forbidden,
pass through the lane; other GPU memory goes in messages, as in ``direct``.
"""

from __future__ import annotations

from mpiddl.base.segments import chunked, split
from mpiddl.base.waits import ALREADY, Wait, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.direct import direct_all_reduce
from mpiddl.collectives.node.lane import NOWHERE, Lane, Place
from mpiddl.collectives.node.lanes import lend
from mpiddl.collectives.node.node_buffers import Weights, meet, pieces_of
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device

__all__ = ["SMALL_BYTES", "finish", "shared_all_reduce", "show"]

SMALL_BYTES = 16 << 10
"""Up to here every rank adds everything itself: one turn, and no result to hand back."""
MEDIUM_BYTES = 128 << 10
"""Up to here it does so where no buffer is in a window, or where turns cost more than bytes."""


def shared_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over the ranks of one node, in place; the same bits on every rank.

    Adds in rank order and rounds 16-bit floats once, so the bits depend neither on the place
    of a value in its buffer nor on where the buffer is. ``chunk_bytes`` is that of messages.
    """
    lane = channel.lane if channel.size > 1 else None
    # At once: ranks meet in the order of their calls, also where a GPU keeps one from beginning.
    ticket = ALREADY if lane is None else lane.ticket()
    return _in_lane(buffer, reduction, channel, device, chunk_bytes, lane, ticket)


def _in_lane(
    buffer: Buffer,
    reduction: Reduction,
    channel: Channel,
    device: Device,
    chunk_bytes: int,
    lane: Lane | None,
    ticket: Wait,
) -> Waits[None]:
    if channel.size == 1:
        if reduction.weight is not None:
            device.scale(buffer, reduction.weight)
        return
    assert lane is not None
    yield ticket
    yield device.fence()
    lane.note(show(buffer, lane, device), reduction.weight)
    yield lane.go()
    reached = yield from finish(buffer, reduction.op, lane, device)
    if not reached:
        yield from direct_all_reduce(buffer, reduction, channel, device, chunk_bytes)


def show(buffer: Buffer, lane: Lane, device: Device) -> Place:
    """Before the first turn: where the buffer is. One that others had better not go to is shown in
    the lane itself."""
    if device.late:
        return lend(buffer, lane, device)
    if buffer.nbytes <= min(MEDIUM_BYTES if lane.crowded else SMALL_BYTES, lane.room):
        place = NOWHERE
    else:
        place = lend(buffer, lane, device)
        if place.window != 0 or buffer.nbytes > min(MEDIUM_BYTES, lane.room):
            return place
    lane.shown(buffer, (lane.turn + 1) % 2)[lane.rank].copy_(buffer)
    return place


def finish(buffer: Buffer, op: str, lane: Lane, device: Device) -> Waits[bool]:
    """After the first turn: reduce, and leave the lane. False, on every rank, if the buffers cannot
    be reached: they are as they were."""
    places, weights = lane.notes()
    meeting = None
    small = buffer.nbytes <= min(MEDIUM_BYTES, lane.room) and not any(p.window for p in places)
    if small and not device.late:
        device.combine(op, lane.shown(buffer, lane.turn % 2), weights, [buffer])
    elif (meeting := meet(lane, places, weights, buffer, device)) is not None:
        segment = split(len(buffer), lane.size)[lane.rank]
        for piece in pieces_of(segment, buffer.itemsize, lane.size, device):
            meeting.reduce(piece, op)
        yield device.fence()
        yield lane.go()
    elif not device.late:
        yield from _through_lane(buffer, op, weights, lane, device)
    lane.leave()
    return meeting is not None or not device.late


def _through_lane(
    buffer: Buffer, op: str, weights: Weights, lane: Lane, device: Device
) -> Waits[None]:
    """Piece by piece, in one turn each: while a piece enters, the one before is added and the one
    before that leaves."""
    pieces = chunked(slice(0, len(buffer)), lane.room // buffer.itemsize)
    previous: Buffer | None = None
    for piece in [*pieces, None]:
        place = (lane.turn + 1) % 2
        if piece is not None:
            entering = buffer[piece]
            lane.entered[lane.rank][place][: entering.nbytes].view(buffer.dtype).copy_(entering)
        if previous is not None:
            parts = split(len(previous), lane.size)
            mine = previous[parts[lane.rank]]
            shown = [_view(pair[1 - place], previous)[parts[lane.rank]] for pair in lane.entered]
            device.combine(op, shown, weights, [mine])
            _view(lane.left[lane.rank][place], mine).copy_(mine)
        yield lane.go()
        if previous is not None:
            for peer, part in enumerate(parts):
                if peer != lane.rank:
                    theirs = previous[part]
                    theirs.copy_(_view(lane.left[peer][place], theirs))
        previous = None if piece is None else entering


def _view(memory: Buffer, like: Buffer) -> Buffer:
    return memory[: like.nbytes].view(like.dtype)
