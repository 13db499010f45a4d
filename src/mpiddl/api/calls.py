"""The collectives as users call them: torch or numpy, blocking or not, checked first."""

from __future__ import annotations

import json
from typing import Any, Literal, overload

from mpiddl.api.call import (
    TensorOrArray,
    check_call,
    check_root,
    describe_buffer,
    flat,
    new_channel,
    run,
    start,
)
from mpiddl.api.quick import quick_of
from mpiddl.collectives import barrier as barriers
from mpiddl.collectives import broadcast as broadcasts
from mpiddl.collectives import objects
from mpiddl.collectives.channel import bytes_of
from mpiddl.collectives.choose import choose, chunk_bytes_for
from mpiddl.collectives.nccl import has_communicator, make_communicator
from mpiddl.collectives.node.lanes import foreground_of, is_mapped
from mpiddl.collectives.reduction import check_scales, reduction_of, scaled
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["all_reduce", "barrier", "broadcast", "broadcast_json", "gather_json"]


@overload
def all_reduce(
    tensor: TensorOrArray,
    op: str = ...,
    *,
    algorithm: str | None = ...,
    pre_scale: float | None = ...,
    post_scale: float | None = ...,
    async_: Literal[False] = ...,
    world: World | None = ...,
    check: bool | None = ...,
) -> TensorOrArray: ...
@overload
def all_reduce(
    tensor: TensorOrArray,
    op: str = ...,
    *,
    algorithm: str | None = ...,
    pre_scale: float | None = ...,
    post_scale: float | None = ...,
    async_: Literal[True],
    world: World | None = ...,
    check: bool | None = ...,
) -> Work: ...
def all_reduce(
    tensor: TensorOrArray,
    op: str = "sum",
    *,
    algorithm: str | None = None,
    pre_scale: float | None = None,
    post_scale: float | None = None,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Reduce ``tensor`` over all ranks, in place. Every rank ends with the same bits.

    Args:
        tensor: A contiguous torch tensor (CPU or GPU), numpy or CuPy array; the same shape and
            dtype, on the same kind of device, on every rank.
        op: ``sum``, ``mean`` (of floats), ``min``, ``max`` or ``prod``. NaN spreads.
        algorithm: ``auto``, ``shared``, ``hierarchical``, ``ring``, ``direct``, ``doubling``,
            ``library``, ``nccl`` or ``reference``; default MPIDDL_ALGORITHM, else ``auto``.
        pre_scale: What this rank's floats are multiplied by before they are reduced; on every
            rank or on none (else ranks get different results), but each may have its own. In sums
            it costs no extra pass.
        post_scale: What the result is multiplied by, the same on every rank.
        async_: Return a ``Work`` at once; ``tensor`` must be left alone until its ``wait()``
            returns. Collectives are started in the same order on every rank, and may be waited
            for in any.
        world: The ranks that take part; default those of ``mpiddl.init()``.
        check: Compare the call between ranks first, so that a mistake is an error on every rank
            and not a hang; default MPIDDL_CHECK.

    Returns:
        ``tensor``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: Unknown ``op`` or ``algorithm``.
        UnsupportedBufferError: Not contiguous, on a device that is neither the host nor an NVIDIA
            GPU, or a dtype that cannot be reduced or scaled in this way.
        MismatchError: With ``check``: ranks passed different shapes, dtypes, ops or algorithms.
    """
    world = world or current_world()
    if not (
        async_ or algorithm or check is not None or pre_scale is not None or post_scale is not None
    ):
        quick = quick_of(world)
        if quick is not None and quick.all_reduce(tensor, op):
            return tensor
    algorithm = algorithm or world.settings.algorithm
    problem = None
    try:
        buffer = flat(tensor)
        check_scales(buffer.dtype, pre_scale, post_scale)
        reduction = reduction_of(op, buffer.dtype, world.size, pre_scale)
        device = device_of(buffer)
        mapped = algorithm == "hierarchical" and is_mapped(buffer, device, world)
        like = algorithm, buffer.dtype, buffer.nbytes, world
        chosen = choose(*like, device=device, mapped=mapped)
    except (ValueError, TypeError) as error:
        problem = error
    check_call(
        lambda: (
            f"all_reduce(op={op!r}, algorithm={algorithm!r}, "
            f"pre_scale={'none' if pre_scale is None else 'some'}, post_scale={post_scale}) "
            f"of {describe_buffer(tensor)}"
        ),
        problem,
        world,
        check,
    )
    if chosen.algorithm.gpu and not has_communicator(world.native):
        run(world, barriers.barrier(new_channel(world)))  # who comes first helps others on
        make_communicator(world.native, device, world)
        chosen = choose(*like, device=device, mapped=mapped)  # some rank may not have NCCL
    lanes = foreground_of(world) if chosen.algorithm.lanes else None
    channel = new_channel(world, lanes)
    waits = chosen.run(buffer, reduction, channel, device)
    before = pre_scale if reduction.weight is None else None
    waits = scaled(waits, buffer, before, post_scale, device)
    return start(waits, world, tensor, async_, device)


@overload
def broadcast(
    tensor: TensorOrArray,
    root: int = ...,
    *,
    async_: Literal[False] = ...,
    world: World | None = ...,
    check: bool | None = ...,
) -> TensorOrArray: ...
@overload
def broadcast(
    tensor: TensorOrArray,
    root: int = ...,
    *,
    async_: Literal[True],
    world: World | None = ...,
    check: bool | None = ...,
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

    Arguments, result and errors as for ``all_reduce``; any dtype will do.

    Raises:
        ValueError: ``root`` is no rank.
    """
    world = world or current_world()
    problem = None
    try:
        buffer = flat(tensor, any_dtype=True)
        root = check_root(root, world)
    except (ValueError, TypeError) as error:
        problem = error
    check_call(
        lambda: f"broadcast(root={root}) of {describe_buffer(tensor)}", problem, world, check
    )
    channel, device = new_channel(world), device_of(buffer)
    chunk_bytes = chunk_bytes_for(device, world)
    waits = broadcasts.broadcast(bytes_of(buffer), root, channel, chunk_bytes)
    return start(waits, world, tensor, async_, device)


@overload
def barrier(
    *, async_: Literal[False] = ..., world: World | None = ..., check: bool | None = ...
) -> None: ...
@overload
def barrier(
    *, async_: Literal[True], world: World | None = ..., check: bool | None = ...
) -> Work: ...
def barrier(
    *, async_: bool = False, world: World | None = None, check: bool | None = None
) -> Work | None:
    """Return once every rank has called it; with ``async_`` a ``Work`` that is complete then.

    Says nothing of messages and async works that are still in flight.
    """
    world = world or current_world()
    check_call(lambda: "barrier()", None, world, check)
    return start(barriers.barrier(new_channel(world)), world, None, async_)


def broadcast_json(value: Any, root: int = 0, *, world: World | None = None) -> Any:
    """Rank ``root``'s value on every rank, through JSON: no pickle, so nothing is executed.

    For small things. Tuples come back as lists.

    Raises:
        TypeError: The value is not JSON.
        ValueError: ``root`` is no rank.
    """
    world = world or current_world()
    problem = _json_problem(value if root == world.rank else None, root, world)
    check_call(lambda: f"broadcast_json(root={root})", problem, world)
    return run(world, objects.broadcast_json(value, int(root), new_channel(world)))


def gather_json(value: Any, root: int | None = None, *, world: World | None = None) -> Any:
    """A list of every rank's value, in rank order, through JSON as in ``broadcast_json``.

    Args:
        value: Numbers, strings, lists, dictionaries, None.
        root: The rank that gets the list (the others get None); default every rank.
    """
    world = world or current_world()
    problem = _json_problem(value, 0 if root is None else root, world)
    check_call(lambda: f"gather_json(root={root})", problem, world)
    hub = None if root is None else int(root)
    return run(world, objects.gather_json(value, hub, new_channel(world)))


def _json_problem(value: Any, root: int, world: World) -> Exception | None:
    """Found before anything is sent, so that ranks can tell each other."""
    try:
        check_root(root, world)
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        return error
    return None
