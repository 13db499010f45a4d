"""``mpiddl.gather``: every rank's tensor on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import check_root, describe_parts, flat, roots_parts
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, start
from mpiddl.collectives import gather as algorithm
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["gather"]


@overload
def gather(
    output: TensorOrArray | None,
    input: TensorOrArray,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    **others: Unpack[Options],
) -> TensorOrArray | None: ...
@overload
def gather(
    output: TensorOrArray | None,
    input: TensorOrArray,
    root: int = ...,
    *,
    lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    **others: Unpack[Options],
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
        input: The same dtype as ``output``; on rank ``root`` it may be its part of ``output``.
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
    describe = lambda: f"gather(root={root}) of {describe_parts(lengths, input)}"  # noqa: E731
    with Checked(describe, world, check):
        root = check_root(root, world)
        buffer = flat(input, any_dtype=True)
        is_root = world.rank == root
        parts = roots_parts(output, buffer, lengths, world, "output", "input") if is_root else []
    waits = algorithm.gather(parts, buffer, root, new_channel(world))
    return start(waits, world, output, async_, device_of(buffer))
