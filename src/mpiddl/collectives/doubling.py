"""All-reduce by recursive doubling: ceil(log2(n)) exchanges of the whole buffer.

With four ranks, what each of them holds:

    start      0        1        2        3
    round 1    0+1      0+1      2+3      2+3      partners: ranks that differ in bit 0
    round 2    (0+1)+(2+3)       everywhere        partners: ranks that differ in bit 1

Cost: log2(n) messages of the whole buffer, so few steps but many bytes: for small buffers.
"""

from __future__ import annotations

import torch

from mpiddl.base.segments import chunked
from mpiddl.base.waits import AllOf, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device

__all__ = ["doubling_all_reduce"]


def doubling_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place; the same bits on every rank.

    Of n ranks 2**k take part in the exchanges. The n - 2**k others, every second one of the
    first ranks, hand their buffer to the next rank before and get the result from it after. So
    a partial result always is that of consecutive ranks, and both partners of an exchange
    combine the same two partial results, the lower ranks' first.

    16-bit floats travel as float32 partial results and are rounded once, at the end. Chunks are
    reduced one after the other; needs two chunks of scratch.

    Source: Thakur, Rabenseifner & Gropp, Int. J. High Perform. Comput. Appl. 19(1), 2005, 49-66.
    """
    halves = buffer.is_floating_point() and buffer.dtype.itemsize == 2
    dtype = torch.float32 if halves else buffer.dtype
    chunk_length = max(1, min(len(buffer), chunk_bytes // dtype.itemsize))
    with device.scratch(2 * chunk_length, dtype) as scratch:
        for part in chunked(slice(0, len(buffer)), chunk_length):
            chunk = buffer[part]
            mine, spare = scratch[: len(chunk)], scratch[chunk_length:][: len(chunk)]
            device.copy(mine, chunk)
            if reduction.weight is not None:
                device.scale(mine, reduction.weight)
            yield from _reduce_chunk(chunk, mine, spare, reduction.op, channel, device)


def _reduce_chunk(
    chunk: Buffer, mine: Buffer, spare: Buffer, op: str, channel: Channel, device: Device
) -> Waits[None]:
    """Reduce ``mine`` over all ranks into ``chunk``."""
    rank, size = channel.rank, channel.size
    rounds = size.bit_length() - 1
    extra = size - (1 << rounds)

    # Fold in: of the first 2*extra ranks, the even ones leave their part to the odd ones.
    paired = rank < 2 * extra
    yield device.fence()
    if paired and rank % 2 == 0:
        yield AllOf([channel.receive(chunk, rank + 1), channel.send(mine, rank + 1)])
        return
    if paired:
        yield channel.receive(spare, rank - 1)
        device.fold(op, spare, mine, None)
        mine, spare = spare, mine

    # Exchange: those that are left are numbered anew, without gaps.
    place = rank // 2 if paired else rank - extra
    for bit in range(rounds):
        peer_place = place ^ (1 << bit)
        peer = 2 * peer_place + 1 if peer_place < extra else peer_place + extra
        yield device.fence()
        yield AllOf([channel.receive(spare, peer), channel.send(mine, peer)])
        if peer_place < place:
            mine, spare = spare, mine
        device.fold(op, mine, spare, None)

    # Hand out.
    device.copy(chunk, mine)
    if paired:
        yield device.fence()
        yield channel.send(chunk, rank - 1)
