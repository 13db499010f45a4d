"""``mpiddl.broadcast``: one rank's tensor on every rank."""

from __future__ import annotations

from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import check_root, describe_buffer, flat
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, start
from mpiddl.collectives import broadcast as algorithm
from mpiddl.collectives.channel import bytes_of
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["broadcast"]


@overload
def broadcast(
    tensor: TensorOrArray,
    root: int = ...,
    *,
    async_: Literal[False] = ...,
    **others: Unpack[Options],
) -> TensorOrArray: ...
@overload
def broadcast(
    tensor: TensorOrArray, root: int = ..., *, async_: Literal[True], **others: Unpack[Options]
) -> Work: ...
def broadcast(
    tensor: TensorOrArray,
    root: int = 0,
    *,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Overwrite ``tensor`` on every rank with rank ``root``'s.

    Arguments, result and errors are those of ``all_reduce``; any dtype will do.

    Raises:
        ValueError: ``root`` is no rank.
    """
    world = world or current_world()
    with Checked(lambda: f"broadcast(root={root}) of {describe_buffer(tensor)}", world, check):
        buffer = flat(tensor, any_dtype=True)
        root = check_root(root, world)
    channel, device = new_channel(world), device_of(buffer)
    waits = algorithm.broadcast(bytes_of(buffer), root, channel, chunk_bytes_for(device, world))
    return start(waits, world, tensor, async_, device)
