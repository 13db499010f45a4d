"""Does srun keep ranks together at the end of MPI_Init, as Open MPI expects of it?"""

from __future__ import annotations

import time

import torch

from mpiddl.api.objects import gather_json
from mpiddl.api.send_recv import recv, send
from mpiddl.comm.world import World
from mpiddl.launch import pmix

__all__ = ["empty_fence_waits"]

LATE_SECONDS = 2.0
"""Spent where all is well; a busy rank 0 may need it to come through a fence that does not wait."""
POLL_SECONDS = 0.01


def empty_fence_waits(world: World) -> bool | None:
    """Whether a PMIx fence that collects no data waits for the ranks of other nodes. Collective.

    The first rank of the second node stays out of one. Rank 0 sends a word when it is through: if
    that comes while the other is still outside, the fence has not waited.

    Returns:
        None: there is one node only, or no such fence.
    """
    if world.num_nodes == 1:
        return None
    late, word = world.layout.nodes[1][0], torch.zeros(1)
    is_early = False
    if world.rank == late:
        work = recv(word, 0, world=world, async_=True)
        deadline = time.monotonic() + LATE_SECONDS
        while not (is_early := work.done()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        exists = pmix.fence(collect=False)
        work.wait()
    else:
        exists = pmix.fence(collect=False)
        if world.rank == 0:
            send(word, late, world=world)
    exists, is_early = gather_json([exists, is_early], world=world)[late]
    return not is_early if exists else None
