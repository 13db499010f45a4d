"""One rank's parts to every rank, and every rank's part to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from mpiddl.api.call import (
    TensorOrArray,
    check_apart,
    check_call,
    check_length,
    check_root,
    check_same_dtype,
    describe_buffer,
    describe_dtype,
    flat,
    new_channel,
    parts_of,
    same_memory,
    start,
)
from mpiddl.collectives import gather as gathers
from mpiddl.collectives import scatter as scatters
from mpiddl.comm.world import World, current_world
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["gather", "scatter"]


@overload
def gather(
    output: TensorOrArray | None,
    input: TensorOrArray,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    world: World | None = ...,
    check: bool | None = ...,
) -> TensorOrArray | None: ...
@overload
def gather(
    output: TensorOrArray | None,
    input: TensorOrArray,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    world: World | None = ...,
    check: bool | None = ...,
) -> Work: ...
def gather(
    output: TensorOrArray | None,
    input: TensorOrArray,
    root: int = 0,
    *,
    lengths: Sequence[int] | None = None,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work | None:
    """Every rank's ``input``, one after the other in rank order, in rank ``root``'s ``output``.

    Args:
        output: Any dtype; on rank ``root``. Other ranks may pass None.
        input: Of the same dtype; on rank ``root`` it may be its part of ``output``.
        root: The rank that gets the result.
        lengths: Elements of each rank's ``input``, the same list on every rank; default: all
            equal.
        async_: As for ``all_reduce``, like ``world`` and ``check``.

    Returns:
        ``output``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: ``root`` is no rank, or the lengths or dtypes do not fit.
    """
    world = world or current_world()
    problem = None
    parts: list[Buffer] = []
    try:
        root = check_root(root, world)
        buffer = flat(input, any_dtype=True)
        if world.rank == root:
            parts = _roots_parts(output, buffer, lengths, world, "output", "input")
    except (ValueError, TypeError) as error:
        problem = error
    check_call(lambda: _describe("gather", root, lengths, input), problem, world, check)
    waits = gathers.gather(parts, buffer, root, new_channel(world))
    return start(waits, world, output, async_, device_of(buffer))


@overload
def scatter(
    output: TensorOrArray,
    input: TensorOrArray | None,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    world: World | None = ...,
    check: bool | None = ...,
) -> TensorOrArray: ...
@overload
def scatter(
    output: TensorOrArray,
    input: TensorOrArray | None,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    world: World | None = ...,
    check: bool | None = ...,
) -> Work: ...
def scatter(
    output: TensorOrArray,
    input: TensorOrArray | None,
    root: int = 0,
    *,
    lengths: Sequence[int] | None = None,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Part r of rank ``root``'s ``input`` in rank r's ``output``.

    Args:
        output: Any dtype; on rank ``root`` it may be its part of ``input``.
        input: Of the same dtype, on rank ``root``; left as it is. Other ranks may pass None.
        root: The rank that has the parts.
        lengths: Elements of each rank's ``output``, the same list on every rank; default: all
            equal.
        async_: As for ``all_reduce``, like ``world`` and ``check``.

    Returns:
        ``output``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: ``root`` is no rank, or the lengths or dtypes do not fit.
    """
    world = world or current_world()
    problem = None
    parts: list[Buffer] = []
    try:
        root = check_root(root, world)
        buffer = flat(output, any_dtype=True)
        if world.rank == root:
            parts = _roots_parts(input, buffer, lengths, world, "input", "output")
    except (ValueError, TypeError) as error:
        problem = error
    check_call(lambda: _describe("scatter", root, lengths, output), problem, world, check)
    waits = scatters.scatter(buffer, parts, root, new_channel(world))
    return start(waits, world, output, async_, device_of(buffer))


def _roots_parts(
    everything: Any,
    own: Buffer,
    lengths: Sequence[int] | None,
    world: World,
    name: str,
    own_name: str,
) -> list[Buffer]:
    """The root's tensor with everyone's parts, of which its ``own`` is one."""
    if everything is None:
        raise ValueError(f"rank {world.rank} is the root and must pass {name}, not None")
    whole = flat(everything, any_dtype=True)
    check_same_dtype(*((whole, own) if name == "output" else (own, whole)))
    parts = parts_of(whole, lengths, world, "lengths", name)
    check_length(own, parts[world.rank], world, own_name, name)
    check_apart(whole, own, own=same_memory(own, parts[world.rank]))
    return parts


def _describe(name: str, root: int, lengths: Sequence[int] | None, tensor: Any) -> str:
    if lengths is None:
        return f"{name}(root={root}) of {describe_buffer(tensor)}"
    return f"{name}(root={root}, lengths={list(lengths)}) of {describe_dtype(tensor)}"
