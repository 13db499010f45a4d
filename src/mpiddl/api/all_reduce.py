"""``mpiddl.all_reduce``: a reduction over all ranks on every rank."""

from __future__ import annotations

from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import describe_buffer, flat
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, run, start
from mpiddl.api.short_way import short_way_of
from mpiddl.collectives.barrier import barrier
from mpiddl.collectives.choose import choose
from mpiddl.collectives.nccl import has_communicator, make_communicator
from mpiddl.collectives.node.lanes import foreground_of, is_mapped
from mpiddl.collectives.reduction import check_scales, reduction_of, scaled
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["all_reduce"]


class _Scales(Options, total=False):
    pre_scale: float | None
    post_scale: float | None


@overload
def all_reduce(
    tensor: TensorOrArray,
    op: str = ...,
    *,
    algorithm: str | None = ...,
    async_: Literal[False] = ...,
    **others: Unpack[_Scales],
) -> TensorOrArray: ...
@overload
def all_reduce(
    tensor: TensorOrArray,
    op: str = ...,
    *,
    algorithm: str | None = ...,
    async_: Literal[True],
    **others: Unpack[_Scales],
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
        short_way = short_way_of(world)
        if short_way is not None and short_way.all_reduce(tensor, op):
            return tensor
    algorithm = algorithm or world.settings.algorithm

    def describe() -> str:
        before = "none" if pre_scale is None else "some"  # each rank may have its own
        scales = f"pre_scale={before}, post_scale={post_scale}"
        called = f"all_reduce(op={op!r}, algorithm={algorithm!r}, {scales})"
        return f"{called} of {describe_buffer(tensor)}"

    with Checked(describe, world, check):
        buffer = flat(tensor)
        check_scales(buffer.dtype, pre_scale, post_scale)
        reduction = reduction_of(op, buffer.dtype, world.size, pre_scale)
        device = device_of(buffer)
        mapped = algorithm == "hierarchical" and is_mapped(buffer, device, world)
        like = algorithm, buffer.dtype, buffer.nbytes, world
        chosen = choose(*like, device=device, mapped=mapped)
    if chosen.algorithm.gpu and not has_communicator(world.native, world):
        run(world, barrier(new_channel(world)))  # who comes first helps others on
        make_communicator(world.native, device, world)
        chosen = choose(*like, device=device, mapped=mapped)  # some rank may not have NCCL
    channel = new_channel(world, foreground_of(world) if chosen.algorithm.lanes else None)
    waits = chosen.run(buffer, reduction, channel, device)
    before = pre_scale if reduction.weight is None else None
    waits = scaled(waits, buffer, before, post_scale, device)
    return start(waits, world, tensor, async_, device)
