"""All-reduce on one node: every rank adds its segment, straight from and into all buffers.

With three ranks and segments a b c:

    rank 0 reads a of all three buffers, adds, and writes the sum into all three
    rank 1 the same for b
    rank 2 the same for c

No message is on the path: ranks meet in a lane. Buffers in a window are used where they are. Other
buffers are reached through the kernel, or, where that is forbidden, pass through the lane.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpiddl.collectives.channel import Channel
from mpiddl.collectives.lane import Lane, Place
from mpiddl.collectives.lanes import place_of
from mpiddl.collectives.reduction import Reduction
from mpiddl.comm.reach import Reach
from mpiddl.devices.base import Buffer, Device
from mpiddl.segments import chunked, split
from mpiddl.waits import Waits

__all__ = ["SMALL_BYTES", "reduce_segment", "shared_all_reduce"]

SMALL_BYTES = 16 << 10
"""Up to here every rank adds everything itself: one turn, and no result to hand back."""
PIECE_BYTES = 512 << 10
"""Added at a time: what is added must be in the cache still when it is handed out."""

Weights = Sequence[float] | None


def shared_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over the ranks of one node, in place; the same bits on every rank.

    Adds in rank order and rounds 16-bit floats once, so the bits depend neither on the place
    of a value in its buffer nor on where the buffer is. ``chunk_bytes`` is not used.
    """
    if channel.size == 1:
        if reduction.weight is not None:
            device.scale(buffer, reduction.weight)
        return
    lane = channel.lane
    assert lane is not None
    yield lane.ticket()
    if buffer.nbytes <= min(SMALL_BYTES, lane.room):
        yield from _small(buffer, reduction, lane, device)
    else:
        lane.note(place_of(lane.world, buffer), reduction.weight)
        yield lane.go()
        places, weights = lane.notes()
        segment = split(len(buffer), lane.size)[lane.rank]
        everyones = lane.views(places, buffer)
        reach = lane.world.reach
        if everyones is not None:
            reduce_segment(everyones, segment, reduction.op, weights, lane.rank, device)
            yield lane.go()
        elif reach is not None:
            _reduce_afar(buffer, segment, reduction.op, weights, places, lane.rank, reach, device)
            yield lane.go()
        else:
            yield from _through_lane(buffer, reduction.op, weights, lane, device)
    lane.leave()


def reduce_segment(
    everyones: Sequence[Buffer],
    segment: slice,
    op: str,
    weights: Weights,
    rank: int,
    device: Device,
) -> None:
    """Add ``segment`` of all buffers in their order and store it in all of them."""
    for piece in chunked(segment, max(1, PIECE_BYTES // everyones[0].itemsize)):
        parts = [buffer[piece] for buffer in everyones]
        device.combine(op, parts, weights, parts[rank])
        for peer, part in enumerate(parts):
            if peer != rank:
                part.copy_(parts[rank])


def _reduce_afar(
    buffer: Buffer,
    segment: slice,
    op: str,
    weights: Weights,
    places: Sequence[Place],
    rank: int,
    reach: Reach,
    device: Device,
) -> None:
    """The same on buffers that only the kernel can reach."""
    itemsize, peers = buffer.itemsize, [peer for peer in range(len(places)) if peer != rank]
    length = max(1, PIECE_BYTES // len(peers) // itemsize)
    length = min(length, segment.stop - segment.start)
    with device.scratch(len(peers) * length, buffer.dtype) as scratch:
        for piece in chunked(segment, max(1, length)):
            mine = buffer[piece]
            parts = [scratch[n * length :][: len(mine)] for n in range(len(peers))]
            at = piece.start * itemsize
            for peer, part in zip(peers, parts, strict=True):
                reach.read(part.data_ptr(), mine.nbytes, peer, places[peer].address + at)
            device.combine(op, [*parts[:rank], mine, *parts[rank:]], weights, mine)
            for peer in peers:
                reach.write(mine.data_ptr(), mine.nbytes, peer, places[peer].address + at)


def _small(buffer: Buffer, reduction: Reduction, lane: Lane, device: Device) -> Waits[None]:
    """One turn: everyone shows everything, everyone adds everything."""
    shown = lane.shown((lane.turn + 1) % 2, buffer)
    shown[lane.rank].copy_(buffer)
    lane.note(Place(0, 0, 0), reduction.weight)
    yield lane.go()
    _, weights = lane.notes()
    device.combine(reduction.op, shown, weights, buffer)


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
            device.combine(op, shown, weights, mine)
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
