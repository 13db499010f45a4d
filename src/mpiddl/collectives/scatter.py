"""Scatter: one rank's parts, one to each rank."""

from __future__ import annotations

from collections.abc import Sequence

from mpiddl.base.waits import AllOf, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of

__all__ = ["scatter"]


def scatter(mine: Buffer, parts: Sequence[Buffer], root: int, channel: Channel) -> Waits[None]:
    """Fill ``mine`` on each rank with ``parts[rank]`` of rank ``root``.

    ``parts`` is not used on other ranks.
    """
    device = device_of(mine)
    yield device.fence()
    if channel.rank != root:
        yield channel.receive(mine, root)
        return
    peers = [peer for peer in range(channel.size) if peer != root]
    sends = [channel.send(parts[peer], peer) for peer in peers]
    if mine.data_ptr() != parts[root].data_ptr():
        device.copy(mine, parts[root])
    yield AllOf(sends)
