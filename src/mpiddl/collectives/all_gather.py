"""All-gather by direct exchange."""

from __future__ import annotations

from collections.abc import Sequence

from mpiddl.base.waits import Waits
from mpiddl.collectives.all_to_all import all_to_all
from mpiddl.collectives.channel import Channel
from mpiddl.devices.base import Buffer

__all__ = ["all_gather"]


def all_gather(
    parts: Sequence[Buffer], channel: Channel, mine: Buffer | None = None
) -> Waits[None]:
    """Fill ``parts[peer]`` with each rank's ``mine``; None: this rank's own part is there already.

    As many bytes as on a ring, in one step. Uneven parts cost what they are; on a ring every
    step takes as long as its longest part.
    """
    mine = parts[channel.rank] if mine is None else mine
    yield from all_to_all(parts, [mine] * channel.size, channel)
