"""Reduce-scatter by direct exchange: every rank gets its segment from all others, adds once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from mpiddl.base.segments import chunked
from mpiddl.base.waits import AllOf, Wait, Waits
from mpiddl.collectives.all_to_all import peers_in_turn
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device

__all__ = ["reduce_scatter"]

DEPTH = 2
"""Chunks in flight from and to each peer."""


def reduce_scatter(
    output: Buffer,
    segments: Sequence[Buffer],
    reduction: Reduction,
    channel: Channel,
    device: Device,
    chunk_bytes: int,
) -> Waits[None]:
    """Make ``output`` the reduction over ranks of everyone's ``segments[channel.rank]``.

    Contributions are combined in rank order, whatever the chunks; 16-bit floats are combined in
    float32 and rounded once. Either all ranks have a weight or none has.

    Needs DEPTH chunks of scratch per rank, and one more.

    Args:
        output: May be this rank's own segment; must not overlap the others.
        segments: One per rank, of any lengths, the same on all ranks; left as they are.
    """
    rank, size = channel.rank, channel.size
    weights = yield from _weights(reduction, channel)
    longest = max(len(segment) for segment in segments)
    chunk_length = max(1, min(longest, chunk_bytes // output.itemsize))
    num_chunks = max(1, -(-longest // chunk_length))
    chunks = [_chunks(segment, chunk_length, num_chunks) for segment in segments]
    results = _chunks(output, chunk_length, num_chunks)

    arriving: deque[Wait] = deque()
    sends: deque[Wait] = deque()
    with device.scratch(DEPTH * size * chunk_length, output.dtype) as memory:
        slots = memory.view(DEPTH, size, chunk_length)
        for turn in range(num_chunks + DEPTH - 1):
            if turn < num_chunks:
                if len(sends) == DEPTH:
                    yield sends.popleft()
                yield device.fence()  # what is sent is written, the slot is read
                # No circle of waits: a rank waits for turns behind its own, so the rank that is
                # farthest behind finds all it needs sent and received already.
                mine, slot = chunks[rank][turn], slots[turn % DEPTH]
                peers = peers_in_turn(rank, size)
                arriving.append(AllOf([channel.receive(slot[p][: len(mine)], p) for _, p in peers]))
                sends.append(AllOf([channel.send(chunks[p][turn], p) for p, _ in peers]))
            if turn >= DEPTH - 1:
                yield arriving.popleft()
                done = turn - DEPTH + 1
                parts = [slot[: len(results[done])] for slot in slots[done % DEPTH]]
                parts[rank] = chunks[rank][done]
                device.combine(reduction.op, parts, weights, [results[done]])
        yield AllOf(sends)


def _chunks(segment: Buffer, chunk_length: int, num_chunks: int) -> list[Buffer]:
    parts = chunked(slice(0, len(segment)), chunk_length, num_chunks)
    return [segment[part] for part in parts]


def _weights(reduction: Reduction, channel: Channel) -> Waits[list[float] | None]:
    """Every rank's weight, in rank order; None if this reduction has none.

    A contribution is weighed where it is added: at the sender it would cost a pass and, in 16
    bits, a rounding.
    """
    if reduction.weight is None:
        return None
    mine = torch.tensor([reduction.weight], dtype=torch.float64, device="cpu")
    weights = mine.repeat(channel.size)
    peers = peers_in_turn(channel.rank, channel.size)
    receives = [channel.receive(weights[peer : peer + 1], peer) for _, peer in peers]
    yield AllOf(receives + [channel.send(mine, peer) for peer, _ in peers])
    return [float(weight) for weight in weights]
