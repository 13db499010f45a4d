"""``mpiddl.broadcast_json`` and ``mpiddl.gather_json``: small values, through JSON."""

from __future__ import annotations

import json
from typing import Any

from mpiddl.api.arguments import check_root
from mpiddl.api.call import Checked, new_channel, run
from mpiddl.collectives import objects as algorithm
from mpiddl.comm.world import World, current_world

__all__ = ["broadcast_json", "gather_json"]


def broadcast_json(value: Any, root: int = 0, *, world: World | None = None) -> Any:
    """Rank ``root``'s value on every rank, through JSON: no pickle, so nothing is executed.

    This is for small things. Tuples come back as lists.

    Raises:
        TypeError: The value is not JSON.
        ValueError: ``root`` is no rank.
    """
    world = world or current_world()
    with Checked(lambda: f"broadcast_json(root={root})", world, None):
        root = check_root(root, world)
        json.dumps(value if root == world.rank else None)  # fails before anything is sent
    return run(world, algorithm.broadcast_json(value, root, new_channel(world)))


def gather_json(value: Any, root: int | None = None, *, world: World | None = None) -> Any:
    """A list of every rank's value, in rank order, through JSON as in ``broadcast_json``.

    Args:
        value: Numbers, strings, lists, dictionaries, None.
        root: The rank that gets the list (the others get None); default every rank.
        world: The ranks that take part; default those of ``mpiddl.init()``.
    """
    world = world or current_world()
    with Checked(lambda: f"gather_json(root={root})", world, None):
        root = None if root is None else check_root(root, world)
        json.dumps(value)  # fails before anything is sent
    return run(world, algorithm.gather_json(value, root, new_channel(world)))
