"""Reduce to one rank: a reduce-scatter, then the segments are gathered."""

from __future__ import annotations

from mpiddl.base.segments import split
from mpiddl.base.waits import Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.gather import gather
from mpiddl.collectives.reduce_scatter import reduce_scatter
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device

__all__ = ["reduce"]


def reduce(
    buffer: Buffer,
    reduction: Reduction,
    root: int,
    channel: Channel,
    device: Device,
    chunk_bytes: int,
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place on rank ``root``; left as it is on the others.

    Adding is shared by all ranks. Combines as ``reduce_scatter`` does: in rank order, 16-bit
    floats rounded once. Needs its scratch and 1/n of the buffer.

    Source: Thakur, Rabenseifner & Gropp, Int. J. High Perform. Comput. Appl. 19(1), 2005, 49-66
    (reduce-scatter, then gather).
    """
    segments = [buffer[part] for part in split(len(buffer), channel.size)]
    own = segments[channel.rank]
    with device.scratch(len(own), buffer.dtype) as scratch:
        result = own if channel.rank == root else scratch
        yield from reduce_scatter(result, segments, reduction, channel, device, chunk_bytes)
        yield from gather(segments, result, root, channel)
