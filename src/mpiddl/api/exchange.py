"""Exchanges in which every rank has a part for, or from, every other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from mpiddl.api.call import (
    TensorOrArray,
    check_apart,
    check_call,
    check_length,
    check_same_dtype,
    describe_buffer,
    describe_dtype,
    flat,
    new_channel,
    parts_of,
    same_memory,
    start,
)
from mpiddl.collectives import all_gather as all_gathers
from mpiddl.collectives import all_to_all as all_to_alls
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["all_gather", "all_to_all"]


@overload
def all_gather(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    world: World | None = ...,
    check: bool | None = ...,
) -> TensorOrArray: ...
@overload
def all_gather(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    world: World | None = ...,
    check: bool | None = ...,
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
        input: Of the same dtype; may be this rank's part of ``output``.
        lengths: Elements of each rank's ``input``, the same list on every rank; default: all
            equal.
        async_: As for ``all_reduce``, like ``world`` and ``check``.

    Returns:
        ``output``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: The lengths, or the dtypes, do not fit.
    """
    world = world or current_world()
    problem = None
    try:
        buffer, result = flat(input, any_dtype=True), flat(output, any_dtype=True)
        check_same_dtype(result, buffer)
        parts = parts_of(result, lengths, world, "lengths", "output")
        mine = parts[world.rank]
        check_length(buffer, mine, world, "input", "output")
        check_apart(result, buffer, own=same_memory(buffer, mine))
    except (ValueError, TypeError) as error:
        problem = error
    check_call(
        lambda: (
            f"all_gather of {describe_buffer(input)}"
            if lengths is None
            else f"all_gather(lengths={list(lengths)}) of {describe_dtype(input)}"
        ),
        problem,
        world,
        check,
    )
    waits = all_gathers.all_gather(parts, new_channel(world), buffer)
    return start(waits, world, output, async_, device_of(buffer))


@overload
def all_to_all(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    output_lengths: Sequence[int] | None = ...,
    input_lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    world: World | None = ...,
    check: bool | None = ...,
) -> TensorOrArray: ...
@overload
def all_to_all(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    output_lengths: Sequence[int] | None = ...,
    input_lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    world: World | None = ...,
    check: bool | None = ...,
) -> Work: ...
def all_to_all(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    output_lengths: Sequence[int] | None = None,
    input_lengths: Sequence[int] | None = None,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Part r of ``input`` goes to rank r; part r of ``output`` comes from rank r.

    Args:
        output: Any dtype; must not overlap ``input``.
        input: Of the same dtype; left as it is.
        output_lengths: Elements that come from each rank; default: all equal. What this rank
            says of rank r is what r's ``input_lengths`` says of this rank.
        input_lengths: Elements that go to each rank; default: all equal.
        async_: As for ``all_reduce``, like ``world`` and ``check``.

    Returns:
        ``output``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: The lengths, or the dtypes, do not fit.
        MismatchError: With ``check``: one rank sends another more or less than that one expects.
    """
    world = world or current_world()
    problem = None
    lengths = None
    try:
        buffer, result = flat(input, any_dtype=True), flat(output, any_dtype=True)
        check_same_dtype(result, buffer)
        outgoing = parts_of(buffer, input_lengths, world, "input_lengths", "input")
        incoming = parts_of(result, output_lengths, world, "output_lengths", "output")
        lengths = [len(part) for part in outgoing], [len(part) for part in incoming]
        check_length(outgoing[world.rank], incoming[world.rank], world, "input", "output")
        check_apart(result, buffer)
    except (ValueError, TypeError) as error:
        problem = error
    check_call(lambda: f"all_to_all of {describe_dtype(input)}", problem, world, check, lengths)
    waits = all_to_alls.all_to_all(incoming, outgoing, new_channel(world))
    return start(waits, world, output, async_, device_of(buffer))
