"""All-reduce in two direct exchanges: contributions to the segment's rank, results to everyone.

Every rank reduces one segment. It adds the contributions of all ranks in rank order, once: the
bits of the result depend on neither chunks nor buckets, and 16-bit floats are rounded once.

Cost: 2(n-1)/n of the buffer per rank, as on a ring, but in two steps with n-1 peers at a time: for
few ranks.
"""

from __future__ import annotations

from mpiddl.base.segments import split
from mpiddl.base.waits import Waits
from mpiddl.collectives.all_gather import all_gather
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduce_scatter import reduce_scatter
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device

__all__ = ["direct_all_reduce"]


def direct_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place; the same bits on every rank.

    Scratch and weights as in ``reduce_scatter``.

    Source: Thakur, Rabenseifner & Gropp, Int. J. High Perform. Comput. Appl. 19(1), 2005, 49-66
    (reduce-scatter, then all-gather).
    """
    segments = [buffer[part] for part in split(len(buffer), channel.size)]
    mine = segments[channel.rank]
    yield from reduce_scatter(mine, segments, reduction, channel, device, chunk_bytes)
    yield from all_gather(segments, channel)
