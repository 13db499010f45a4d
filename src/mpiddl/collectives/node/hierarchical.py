"""All-reduce over nodes of several ranks each: shared memory inside, rings between.

With two nodes of two ranks, and segments a b, one for each local rank:

    inside    local rank 0 of each node adds a of its node's buffers, local rank 1 adds b
    between   the two local ranks 0 all-reduce a on a ring, at the same time the local ranks 1 b
    inside    each local rank writes its segment into all buffers of its node

Cost: a node sends and receives 2(m-1)/m of the buffer for m nodes, however many ranks it has; on a
flat ring whose neighbours are on different nodes every rank does.
"""

from __future__ import annotations

from mpiddl.base.segments import split
from mpiddl.base.waits import ALREADY, Wait, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.node.lane import Lane
from mpiddl.collectives.node.lanes import lend
from mpiddl.collectives.node.node_buffers import meet, pieces_of
from mpiddl.collectives.reduction import Reduction
from mpiddl.collectives.ring import ring_all_reduce
from mpiddl.devices.base import Buffer, Device

__all__ = ["hierarchical_all_reduce"]


def hierarchical_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place; the same bits on every rank.

    There are as many segments as the smallest node has ranks; where a node has more, the others
    only lend their buffers. Adds in rank order inside a node, and along the ring between nodes,
    where 16-bit floats are rounded at each step.

    Source: two-level all-reduce as in Jia et al., "Highly scalable deep learning training system
    with mixed-precision", arXiv:1807.11205, 2018.
    """
    lane = channel.lane if channel.size > 1 and len(buffer) else None
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
    if not len(buffer):
        return
    layout = channel.layout
    assert lane is not None
    yield ticket
    yield device.fence()
    lane.note(lend(buffer, lane, device), reduction.weight)
    yield lane.go()
    places, weights = lane.notes()
    meeting = meet(lane, places, weights, buffer, device)
    assert meeting is not None  # choose() sees to that
    num_segments = min(len(ranks) for ranks in layout.nodes)
    if lane.rank < num_segments:
        segment = split(len(buffer), num_segments)[lane.rank]
        pieces = pieces_of(segment, buffer.itemsize, lane.size, device)
        for piece in pieces:
            meeting.combine(piece, reduction.op)
        ring = channel.among([ranks[lane.rank] for ranks in layout.nodes])
        summed = Reduction(reduction.op)  # weights are in it now
        yield from ring_all_reduce(buffer[segment], summed, ring, device, chunk_bytes)
        for piece in pieces:
            meeting.hand_out(piece)
    yield device.fence()
    yield lane.go()
    lane.leave()
