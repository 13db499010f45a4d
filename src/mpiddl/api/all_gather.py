"""``mpiddl.all_gather``: every rank's tensor on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import (
    check_apart,
    check_length,
    check_same_dtype,
    describe_parts,
    flat,
    parts_of,
    same_memory,
)
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, start
from mpiddl.collectives import all_gather as algorithm
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["all_gather"]


@overload
def all_gather(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    **others: Unpack[Options],
) -> TensorOrArray: ...
@overload
def all_gather(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    **others: Unpack[Options],
) -> Work: ...
def all_gather(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    lengths: Sequence[int] | None = None,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Every rank's ``input``, one after the other in rank order, in ``output`` on every rank.

    Args:
        output: Any dtype; shapes do not matter, elements are taken in memory order.
        input: The same dtype as ``output``; may be this rank's part of ``output``.
        lengths: Elements of each rank's ``input``, the same list on every rank; default: all
            equal.
        async_: As for ``all_reduce``, like ``world`` and ``check``.

    Returns:
        ``output``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: The lengths, or the dtypes, do not fit.
    """
    world = world or current_world()
    with Checked(lambda: f"all_gather of {describe_parts(lengths, input)}", world, check):
        buffer, result = flat(input, any_dtype=True), flat(output, any_dtype=True)
        check_same_dtype(result, buffer)
        parts = parts_of(result, lengths, world, "lengths", "output")
        mine = parts[world.rank]
        check_length(buffer, mine, world, "input", "output")
        check_apart(result, buffer, own=same_memory(buffer, mine))
    waits = algorithm.all_gather(parts, new_channel(world), buffer)
    return start(waits, world, output, async_, device_of(buffer))
