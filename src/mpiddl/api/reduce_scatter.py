"""``mpiddl.reduce_scatter``: a reduction over all ranks, one segment of it on each."""

from __future__ import annotations

from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import check_apart, check_same_dtype, describe_buffer, flat, same_memory
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, start
from mpiddl.base.segments import split
from mpiddl.collectives import reduce_scatter as algorithm
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.collectives.reduction import reduction_of
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["reduce_scatter"]


@overload
def reduce_scatter(
    output: TensorOrArray,
    input: TensorOrArray,
    op: str = ...,
    *,
    async_: Literal[False] = ...,
    **others: Unpack[Options],
) -> TensorOrArray: ...
@overload
def reduce_scatter(
    output: TensorOrArray,
    input: TensorOrArray,
    op: str = ...,
    *,
    async_: Literal[True],
    **others: Unpack[Options],
) -> Work: ...
def reduce_scatter(
    output: TensorOrArray,
    input: TensorOrArray,
    op: str = "sum",
    *,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Reduce ``input`` over all ranks, and leave one segment of the result on each.

    Segment r of n goes to rank r. The segments are equally long; if the length of ``input`` does
    not divide by n, the first ``len(input) % n`` of them have one element more. Ranks are combined
    in rank order; 16-bit floats are rounded once.

    Args:
        output: Gets this rank's segment; may be that segment of ``input`` itself.
        input: The same shape and dtype on every rank; left as it is.
        op: As for ``all_reduce``, like the other arguments.

    Returns:
        ``output``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: ``output`` has the wrong length or dtype, or overlaps another segment.
    """
    world = world or current_world()
    with Checked(lambda: f"reduce_scatter(op={op!r}) of {describe_buffer(input)}", world, check):
        buffer, result = flat(input), flat(output)
        check_same_dtype(result, buffer)
        reduction = reduction_of(op, buffer.dtype, world.size)
        segments = [buffer[part] for part in split(len(buffer), world.size)]
        if len(result) != len(segments[world.rank]):
            raise ValueError(
                f"output has {len(result)} elements; rank {world.rank}'s segment of "
                f"{len(buffer)} has {len(segments[world.rank])}"
            )
        check_apart(result, buffer, own=same_memory(result, segments[world.rank]))
    channel, device = new_channel(world), device_of(buffer)
    chunk_bytes = chunk_bytes_for(device, world)
    waits = algorithm.reduce_scatter(result, segments, reduction, channel, device, chunk_bytes)
    return start(waits, world, output, async_, device)
