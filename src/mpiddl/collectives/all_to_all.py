"""All-to-all by direct exchange."""

from __future__ import annotations

from collections.abc import Sequence

from mpiddl.base.waits import AllOf, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of

__all__ = ["all_to_all", "peers_in_turn"]


def peers_in_turn(rank: int, size: int) -> list[tuple[int, int]]:
    """Whom to send to and whom to receive from, in each of the n-1 steps of an exchange.

    Step s goes s ranks to the right, so that no rank is everybody's target at a time.
    """
    return [((rank + step) % size, (rank - step) % size) for step in range(1, size)]


def all_to_all(
    incoming: Sequence[Buffer], outgoing: Sequence[Buffer], channel: Channel
) -> Waits[None]:
    """Send ``outgoing[peer]`` to each rank, receive ``incoming[peer]`` from each.

    Every message goes straight to where it belongs, all of them at once. No scratch.

    Source: the "linear" exchange of Bruck et al., IEEE Trans. Parallel Distrib. Syst. 8(11), 1997,
    1143-1156.
    """
    mine = incoming[channel.rank]
    device = device_of(mine)
    yield device.fence()
    peers = peers_in_turn(channel.rank, channel.size)
    receives = [channel.receive(incoming[peer], peer) for _, peer in peers]
    sends = [channel.send(outgoing[peer], peer) for peer, _ in peers]
    if mine.data_ptr() != outgoing[channel.rank].data_ptr():
        device.copy(mine, outgoing[channel.rank])
    yield AllOf(receives + sends)
