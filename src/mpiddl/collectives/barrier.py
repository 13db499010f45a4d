"""Barrier by dissemination."""

from __future__ import annotations

import torch

from mpiddl.base.waits import AllOf, Waits
from mpiddl.collectives.channel import Channel

__all__ = ["barrier"]


def barrier(channel: Channel) -> Waits[None]:
    """Done once every rank has come here; ceil(log2(n)) rounds of one byte.

    Source: Hensgen, Finkel & Manber, Int. J. Parallel Program. 17(1), 1988, 1-17.
    """
    note, reply = torch.zeros(2, 1, dtype=torch.uint8, device="cpu")
    distance = 1
    while distance < channel.size:
        after = (channel.rank + distance) % channel.size
        before = (channel.rank - distance) % channel.size
        yield AllOf([channel.receive(reply, before), channel.send(note, after)])
        distance *= 2
