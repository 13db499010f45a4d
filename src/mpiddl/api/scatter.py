"""``mpiddl.scatter``: one rank's parts, one to each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import check_root, describe_parts, flat, roots_parts
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, start
from mpiddl.collectives import scatter as algorithm
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["scatter"]


@overload
def scatter(
    output: TensorOrArray,
    input: TensorOrArray | None,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    **others: Unpack[Options],
) -> TensorOrArray: ...
@overload
def scatter(
    output: TensorOrArray,
    input: TensorOrArray | None,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    **others: Unpack[Options],
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
        input: The same dtype as ``output``, on rank ``root``; left as it is. Other ranks may pass
            None.
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
    describe = lambda: f"scatter(root={root}) of {describe_parts(lengths, output)}"  # noqa: E731
    with Checked(describe, world, check):
        root = check_root(root, world)
        buffer = flat(output, any_dtype=True)
        is_root = world.rank == root
        parts = roots_parts(input, buffer, lengths, world, "input", "output") if is_root else []
    waits = algorithm.scatter(buffer, parts, root, new_channel(world))
    return start(waits, world, output, async_, device_of(buffer))
