"""How fast this node's ranks can read and write memory, all at once."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from mpiddl.api.barrier import barrier
from mpiddl.api.objects import gather_json
from mpiddl.base.units import format_bytes
from mpiddl.comm.world import World
from mpiddl.errors import PeerError

__all__ = ["busbw_limit", "check_room", "measure_memory"]

STREAM_BYTES = 64 << 20
"""Of each of the three arrays: larger than a core's caches."""
ROUNDS = 20


def measure_memory(world: World) -> dict[str, Any]:
    """``c = a + b`` by all ranks of a node at a time: bytes read and written per second.

    Returns:
        ``stream_gbps``: of all ranks of rank 0's node together, in 1e9 bytes/s, counted as STREAM
        does: the best of several rounds, each as long as its slowest rank took.
    """
    length = STREAM_BYTES // 4
    a, b, c = (torch.ones(length, device="cpu") for _ in range(3))
    seconds = []
    for _ in range(ROUNDS):
        barrier(world=world)
        started = time.perf_counter()
        torch.add(a, b, out=c)
        barrier(world=world)
        seconds.append(time.perf_counter() - started)
    everyones = gather_json([world.node_rank, seconds], world=world)
    rounds = zip(*(times for node, times in everyones if node == 0), strict=True)
    ranks = sum(node == 0 for node, _ in everyones)
    return {"stream_gbps": 3 * STREAM_BYTES * ranks / min(map(max, rounds)) / 1e9}


def busbw_limit(stream_gbps: float, ranks: int) -> float:
    """GB/s of an all-reduce on one node if memory alone held it up.

    All ranks read their own and write their own buffer once: 2n of the buffer, at busbw =
    2(n-1)/n of it.
    """
    return stream_gbps * (ranks - 1) / ranks**2


def check_room(nbytes: int, what: str, world: World) -> None:
    """Refuse what cannot fit before anything is allocated. Collective.

    Args:
        nbytes: What each rank needs at least, on its device.
        what: What needs it, for the message.
        world: The ranks.

    Raises:
        PeerError: On every rank, if the ranks of one have not enough memory in common.
    """
    if world.device.type == "cuda":
        free, sharers = torch.cuda.mem_get_info(world.device)[0], world.gpu_sharers
    else:
        free, sharers = psutil.virtual_memory().available, world.local_size
    everyones = gather_json([nbytes, free, sharers], world=world)
    for rank, (needed, left, ranks) in enumerate(everyones):
        if needed * ranks > left:
            raise PeerError(
                f"{what} takes at least {format_bytes(needed)} of memory a rank, and the {ranks} "
                f"ranks where rank {rank} is have {format_bytes(left)} left in all: ask for less"
            )
