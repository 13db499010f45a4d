"""Plain messages between neighbours, to see what adding and waiting cost the ring.

Every rank sends 2(n-1)/n of the buffer to its right neighbour and receives as much from its left
one, in chunks of the ring's size, as many of them under way. Nothing is added and no rank waits for
what another one has made of a chunk: this is not an all-reduce.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from mpiddl.api.call import new_channel
from mpiddl.base.segments import chunked, split
from mpiddl.base.waits import Wait
from mpiddl.bench.candidates import Case, InProcess
from mpiddl.bench.timing import wait_for
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.collectives.ring import DEPTH
from mpiddl.comm.world import World
from mpiddl.devices.base import Device
from mpiddl.errors import UnsupportedBufferError

__all__ = ["SENDRECV", "SendRecv"]

SENDRECV = "sendrecv"


class SendRecv(InProcess):
    """MPI_Isend and MPI_Irecv, by the same messages as the ring's."""

    checked = False

    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        world, device = self._world, self._buffers.device
        if world.size == 1:
            raise UnsupportedBufferError("one rank has no neighbour")
        longest = split(len(source), world.size)[0]
        chunk_length = max(1, chunk_bytes_for(device, world) // source.itemsize)
        chunks = [source[chunk] for chunk in chunked(longest, chunk_length)]
        return lambda: _exchange(2 * (world.size - 1) * chunks, world, device)


def _exchange(chunks: list[torch.Tensor], world: World, device: Device) -> None:
    """Send ``chunks`` to the right, and receive the left neighbour's."""
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    channel = new_channel(world)
    flights: deque[tuple[Wait, Wait]] = deque()
    wait_for(device.settled())  # MPI knows nothing of the caller's stream
    with device.scratch(DEPTH * len(chunks[0]), chunks[0].dtype) as scratch:
        slots = [scratch[slot] for slot in chunked(slice(0, len(scratch)), len(chunks[0]))]
        wait_for(device.fence())  # nothing reads the scratch any more
        for turn, chunk in enumerate(chunks):
            if len(flights) == DEPTH:
                _land(flights)
            arriving = channel.receive(slots[turn % DEPTH][: len(chunk)], left)
            flights.append((arriving, channel.send(chunk, right)))
        while flights:
            _land(flights)


def _land(flights: deque[tuple[Wait, Wait]]) -> None:
    for wait in flights.popleft():
        wait_for(wait)
