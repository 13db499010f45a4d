"""All-reduce on a ring: bandwidth-optimal, chunks pipelined.

With three ranks and segments a b c, each rank sends to its right neighbour:

    step      rank 0    rank 1    rank 2
     0          a         b         c       reduce-scatter: what arrives is added
     1          c         a         b
     2          b         c         a       all-gather: what arrives is complete and replaces
     3          a         b         c

Cost: every rank sends 2(n-1)/n of the buffer, whatever n is, in 2(n-1) steps.
"""

from __future__ import annotations

from collections import deque

from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device
from mpiddl.segments import chunked, split
from mpiddl.waits import Wait, Waits

__all__ = ["ring_all_reduce"]

DEPTH = 4
"""Chunks in flight in each direction."""


def ring_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place; the same bits on every rank.

    A rank works through 2(n-1) steps of equally many chunks. A chunk that has arrived in one
    step is sent on in the next, so a rank may wait for the chunk ``lag`` places behind the one
    that it sends, and up to ``lag + 1`` chunks are in flight each way.

    Needs ``lag + 1`` chunks of scratch. A segment's sum is formed in one order, on the way round
    the ring, then copied to all; a 16-bit float is rounded at each of the n-1 additions.

    Source: Patarasuk & Yuan, J. Parallel Distrib. Comput. 69(2), 2009, 117-124.
    """
    rank, size = channel.rank, channel.size
    right, left = (rank + 1) % size, (rank - 1) % size
    if size == 1:
        if reduction.weight is not None:
            device.scale(buffer, reduction.weight)
        return
    segments = split(len(buffer), size)
    longest = segments[0].stop - segments[0].start
    chunk = max(1, min(longest, chunk_bytes // buffer.itemsize))  # elements
    count = max(1, -(-longest // chunk))
    chunks = [[buffer[part] for part in chunked(segment, chunk, count)] for segment in segments]
    places = [(step, part) for step in range(2 * (size - 1)) for part in range(count)]
    lag = min(DEPTH, count) - 1

    sends: deque[Wait] = deque()
    receives: deque[Wait] = deque()
    with device.scratch((lag + 1) * chunk, buffer.dtype) as scratch:
        for place in range(len(places) + lag):
            if place < len(places):
                step, part = places[place]
                outgoing = chunks[(rank - step) % size][part]
                incoming = chunks[(rank - step - 1) % size][part]
                if step < size - 1:  # reduce-scatter: the partial sum stays until it is added to
                    incoming = _slot(scratch, place % (lag + 1), chunk)[: len(incoming)]
                if len(sends) > lag:  # also frees the chunk that an all-gather receive overwrites
                    yield sends.popleft()
                # The receive is posted before the send, so ranks never wait for each other in a
                # circle: whatever a rank sends, its neighbour has made room for.
                receives.append(channel.receive(incoming, left))
                if step == 0 and reduction.weight is not None:
                    device.scale(outgoing, reduction.weight)
                sends.append(channel.send(outgoing, right))
            if place >= lag:
                yield receives.popleft()
                step, part = places[place - lag]
                if step < size - 1:
                    partial = chunks[(rank - step - 1) % size][part]
                    arrived = _slot(scratch, (place - lag) % (lag + 1), chunk)[: len(partial)]
                    device.fold(reduction.op, partial, arrived, reduction.weight)
        while sends:
            yield sends.popleft()


def _slot(scratch: Buffer, index: int, chunk: int) -> Buffer:
    return scratch[index * chunk : (index + 1) * chunk]
