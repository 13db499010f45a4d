"""``mpiddl.reduce``: a reduction over all ranks on one of them."""

from __future__ import annotations

from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import check_root, describe_buffer, flat
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, start
from mpiddl.collectives import reduce as algorithm
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.collectives.reduction import reduction_of
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["reduce"]


@overload
def reduce(
    tensor: TensorOrArray,
    op: str = ...,
    root: int = ...,
    *,
    async_: Literal[False] = ...,
    **others: Unpack[Options],
) -> TensorOrArray: ...
@overload
def reduce(
    tensor: TensorOrArray,
    op: str = ...,
    root: int = ...,
    *,
    async_: Literal[True],
    **others: Unpack[Options],
) -> Work: ...
def reduce(
    tensor: TensorOrArray,
    op: str = "sum",
    root: int = 0,
    *,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Reduce ``tensor`` over all ranks, in place on rank ``root``; others keep theirs.

    Ranks are combined in rank order; 16-bit floats are rounded once. Arguments, result and errors
    are those of ``all_reduce``.

    Raises:
        ValueError: ``root`` is no rank.
    """
    world = world or current_world()
    describe = lambda: f"reduce(op={op!r}, root={root}) of {describe_buffer(tensor)}"  # noqa: E731
    with Checked(describe, world, check):
        buffer = flat(tensor)
        reduction = reduction_of(op, buffer.dtype, world.size)
        root = check_root(root, world)
    channel, device = new_channel(world), device_of(buffer)
    chunk_bytes = chunk_bytes_for(device, world)
    waits = algorithm.reduce(buffer, reduction, root, channel, device, chunk_bytes)
    return start(waits, world, tensor, async_, device)
