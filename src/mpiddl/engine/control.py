"""Small agreements between the ranks of one model, out of the way of everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpiddl.base.waits import Waits
from mpiddl.collectives import objects
from mpiddl.collectives.all_gather import all_gather
from mpiddl.collectives.channel import Channel, MessageChannel
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.collectives.doubling import doubling_all_reduce
from mpiddl.collectives.reduction import Reduction
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.host import HOST
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import engine_of
from mpiddl.engine.work import Work

__all__ = ["Control"]


class Control:
    """Collectives on message tags of their own, so that those of two models never meet,
    in whatever order their backwards end. One at a time, but for ``in_background``.

    Args:
        world: The ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.rank, self.size = world.rank, world.size
        self._engine = engine_of(world)
        self._tags = world.tags.keep(2)
        self._channel, self._background = (MessageChannel(world, tag) for tag in self._tags)

    def largest(self, buffer: Buffer) -> None:
        """Make ``buffer`` the elementwise maximum over ranks."""
        chunk_bytes = chunk_bytes_for(HOST, self._world)
        waits = doubling_all_reduce(buffer, Reduction("max"), self._channel, HOST, chunk_bytes)
        self._engine.run(waits, self._world)

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return self._engine.run(objects.broadcast_json(value, 0, self._channel), self._world)

    def gather_json(self, value: Any) -> Any:
        """A list of every rank's value on every rank."""
        return self._engine.run(objects.gather_json(value, None, self._channel), self._world)

    def all_gather(self, *gathers: Sequence[Buffer]) -> None:
        """In each, fill ``parts[peer]`` from each rank; this rank's own is there already. All are
        on one device."""

        def one_after_the_other() -> Waits[None]:
            for parts in gathers:
                yield from all_gather(parts, self._channel)

        device = device_of(gathers[0][0]) if gathers else HOST
        self._engine.run(one_after_the_other(), self._world, device)

    def in_background(
        self, collective: Callable[[Channel, int], Waits[None]], device: Device
    ) -> Work:
        """Start what ``collective`` makes of messages and their chunk size; one such at a time.

        ``device`` is the device whose memory the caller leaves to it.
        """
        waits = collective(self._background, chunk_bytes_for(device, self._world))
        return self._engine.submit(waits, self._world, device=device)

    def close(self) -> None:
        """Others may use the tags. Every rank does this at the same place in its program."""
        self._world.tags.give_back(self._tags)
        self._tags = []
