"""Gather: every rank's part on one rank."""

from __future__ import annotations

from collections.abc import Sequence

from mpiddl.base.waits import AllOf, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of

__all__ = ["gather"]


def gather(parts: Sequence[Buffer], mine: Buffer, root: int, channel: Channel) -> Waits[None]:
    """Fill ``parts[peer]`` on rank ``root`` with each rank's ``mine``.

    ``parts`` is not used on other ranks. The root's link is what takes the time, so a tree would
    save nothing but the first few microseconds.
    """
    device = device_of(mine)
    yield device.fence()
    if channel.rank != root:
        yield channel.send(mine, root)
        return
    peers = [peer for peer in range(channel.size) if peer != root]
    receives = [channel.receive(parts[peer], peer) for peer in peers]
    if parts[root].data_ptr() != mine.data_ptr():
        device.copy(parts[root], mine)
    yield AllOf(receives)
