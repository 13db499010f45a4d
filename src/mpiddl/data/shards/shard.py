"""The samples of a rank, by the name of a sharding."""

from __future__ import annotations

from typing import Any

from mpiddl.comm.world import World, current_world
from mpiddl.data.shards.kinds import sharding
from mpiddl.data.shards.permutation import Indices
from mpiddl.data.signatures import checks_world

__all__ = ["shard"]


@checks_world
def shard(
    name: str, length: int, world: World | None = None, *, epoch: int = 0, **options: Any
) -> Indices | range:
    """Which of ``length`` samples are this rank's.

    Computed on each rank alone, without messages; the same arguments give the same answer.

    Args:
        name: Of a sharding, see ``mpiddl.data.sharding``.
        length: Samples of the data set.
        world: The ranks; default those of ``mpiddl.init()``.
        epoch: Where a sharding changes with it.
        options: ``seed`` and what that sharding takes.

    Raises:
        DataError: As for ``mpiddl.data.sharding``.
    """
    world = world or current_world()
    return sharding(name, length, **options).shard(world.rank, world.size, epoch)
