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

from mpiddl.base.segments import chunked, split
from mpiddl.base.waits import Wait, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device

__all__ = ["ring_all_reduce"]

DEPTH = 4
"""Chunks in flight in each direction."""


def ring_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place; the same bits on every rank.

    A rank works through 2(n-1) steps of equally many chunks. A chunk that has arrived in one
    step is sent on in the next, so a rank may wait for the chunk ``lag`` turns behind the one
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
    chunks, chunk_length = _chunks(buffer, size, chunk_bytes)
    num_chunks = len(chunks[0])
    turns = [(step, index) for step in range(2 * (size - 1)) for index in range(num_chunks)]
    lag = min(DEPTH, num_chunks) - 1

    sends: deque[Wait] = deque()
    receives: deque[Wait] = deque()
    with device.scratch((lag + 1) * chunk_length, buffer.dtype) as scratch:
        slots = [scratch[slot] for slot in chunked(slice(0, len(scratch)), chunk_length)]
        for turn in range(len(turns) + lag):
            if turn < len(turns):
                step, index = turns[turn]
                outgoing = chunks[(rank - step) % size][index]
                incoming = chunks[(rank - step - 1) % size][index]
                if step < size - 1:  # reduce-scatter: the partial sum stays until it is added to
                    incoming = slots[turn % (lag + 1)][: len(incoming)]
                if len(sends) > lag:  # also frees the chunk that an all-gather receive overwrites
                    yield sends.popleft()
                if step == 0 and reduction.weight is not None:
                    device.scale(outgoing, reduction.weight)
                yield device.fence()  # what is sent is added, what is received into is read
                # The receive is posted before the send, so ranks never wait for each other in a
                # circle: whatever a rank sends, its neighbour has made room for.
                receives.append(channel.receive(incoming, left))
                yield channel.room_after(sends)
                sends.append(channel.send_after(sends, outgoing, right))
            if turn >= lag:
                yield receives.popleft()
                step, index = turns[turn - lag]
                if step < size - 1:
                    partial = chunks[(rank - step - 1) % size][index]
                    arrived = slots[(turn - lag) % (lag + 1)][: len(partial)]
                    device.fold(reduction.op, partial, arrived, reduction.weight)
        while sends:
            yield sends.popleft()


def _chunks(buffer: Buffer, size: int, chunk_bytes: int) -> tuple[list[list[Buffer]], int]:
    """``size`` segments of equally many chunks each, and the length of the longest chunk."""
    segments = split(len(buffer), size)
    longest = segments[0].stop - segments[0].start
    chunk_length = max(1, min(longest, chunk_bytes // buffer.itemsize))
    num_chunks = max(1, -(-longest // chunk_length))
    chunks = [
        [buffer[chunk] for chunk in chunked(segment, chunk_length, num_chunks)]
        for segment in segments
    ]
    return chunks, chunk_length
