"""``mpiddl.barrier``: every rank has come as far."""

from __future__ import annotations

from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.call import Checked, Options, new_channel, start
from mpiddl.collectives import barrier as algorithm
from mpiddl.comm.world import World, current_world
from mpiddl.engine.work import Work

__all__ = ["barrier"]


@overload
def barrier(*, async_: Literal[False] = ..., **others: Unpack[Options]) -> None: ...
@overload
def barrier(*, async_: Literal[True], **others: Unpack[Options]) -> Work: ...
def barrier(
    *, async_: bool = False, world: World | None = None, check: bool | None = None
) -> Work | None:
    """Return once every rank has called it; with ``async_`` a ``Work`` that is complete then.

    Says nothing of messages and async works that are still in flight.
    """
    world = world or current_world()
    with Checked(lambda: "barrier()", world, check):
        pass
    return start(algorithm.barrier(new_channel(world)), world, None, async_)
