"""The collectives as users call them: torch or numpy, blocking or not, checked first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import numpy
import torch

from mpiddl.buckets.agreement import odd_ones, who_has_what
from mpiddl.collectives import barrier as barriers
from mpiddl.collectives import broadcast as broadcasts
from mpiddl.collectives import objects
from mpiddl.collectives.channel import Channel, bytes_of
from mpiddl.collectives.choose import choose
from mpiddl.collectives.lanes import foreground_of
from mpiddl.collectives.reduction import DTYPES, reduction_of
from mpiddl.comm.world import World, current_world
from mpiddl.devices.base import Buffer
from mpiddl.devices.host import HOST
from mpiddl.errors import MismatchError, UnsupportedBufferError
from mpiddl.overlap.engine import engine_of
from mpiddl.overlap.quick import quick_of
from mpiddl.overlap.work import Work
from mpiddl.waits import Waits

__all__ = ["all_reduce", "barrier", "broadcast", "broadcast_json", "gather_json"]

TensorOrArray = TypeVar("TensorOrArray", torch.Tensor, numpy.ndarray[Any, Any])


@overload
def all_reduce(
    tensor: TensorOrArray,
    op: str = ...,
    *,
    algorithm: str | None = ...,
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
    async_: Literal[True],
    world: World | None = ...,
    check: bool | None = ...,
) -> Work: ...
def all_reduce(
    tensor: TensorOrArray,
    op: str = "sum",
    *,
    algorithm: str | None = None,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Reduce ``tensor`` over all ranks, in place. Every rank ends with the same bits.

    Args:
        tensor: A contiguous CPU tensor or numpy array; the same shape and dtype on every rank.
        op: ``sum``, ``mean`` (of floats), ``min``, ``max`` or ``prod``. NaN spreads.
        algorithm: ``auto``, ``ring``, ``library`` or ``reference``; default MPIDDL_ALGORITHM,
            else ``auto``.
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
        UnsupportedBufferError: Not contiguous, not in host memory, or a dtype or op that cannot
            be reduced.
        MismatchError: With ``check``: ranks passed different shapes, dtypes, ops or algorithms.
    """
    world = world or current_world()
    if not async_ and algorithm is None and check is None:
        quick = quick_of(world)
        if quick is not None and quick.all_reduce(tensor, op):
            return tensor
    algorithm = algorithm or world.settings.algorithm
    problem = None
    try:
        buffer = _flat(tensor)
        reduction = reduction_of(op, buffer.dtype, world.size)
        chosen = choose(algorithm, buffer.dtype, buffer.nbytes, world)
    except (ValueError, TypeError) as error:
        problem = error
    _check_call(
        lambda: f"all_reduce(op={op!r}, algorithm={algorithm!r}) of {_describe(tensor)}",
        problem,
        world,
        check,
    )
    lanes = foreground_of(world) if chosen.lanes else None
    channel = Channel(world, world.tags.foreground(), lane=lanes.next() if lanes else None)
    waits = chosen.run(buffer, reduction, channel, HOST, world.settings.chunk_size)
    if async_:
        return engine_of(world).submit(waits, world, result=tensor)
    _run(world, waits)
    return tensor


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
        buffer = _flat(tensor, any_dtype=True)
        _check_root(root, world)
    except (ValueError, TypeError) as error:
        problem = error
    _check_call(lambda: f"broadcast(root={root}) of {_describe(tensor)}", problem, world, check)
    channel = _channel(world)
    waits = broadcasts.broadcast(bytes_of(buffer), root, channel, world.settings.chunk_size)
    if async_:
        return engine_of(world).submit(waits, world, result=tensor)
    _run(world, waits)
    return tensor


def barrier(*, world: World | None = None) -> None:
    """Return once every rank has called it."""
    world = world or current_world()
    _check_call(lambda: "barrier()", None, world)
    _run(world, barriers.barrier(_channel(world)))


def broadcast_json(value: Any, root: int = 0, *, world: World | None = None) -> Any:
    """Rank ``root``'s value on every rank, through JSON: no pickle, so nothing is executed.

    For small things. Tuples come back as lists.

    Raises:
        TypeError: The value is not JSON.
        ValueError: ``root`` is no rank.
    """
    world = world or current_world()
    _check_root(root, world)
    _check_call(lambda: f"broadcast_json(root={root})", None, world)
    return _run(world, objects.broadcast_json(value, root, _channel(world)))


def gather_json(value: Any, root: int | None = None, *, world: World | None = None) -> Any:
    """A list of every rank's value, in rank order, through JSON as in ``broadcast_json``.

    Args:
        value: Numbers, strings, lists, dictionaries, None.
        root: The rank that gets the list (the others get None); default every rank.
    """
    world = world or current_world()
    if root is not None:
        _check_root(root, world)
    _check_call(lambda: f"gather_json(root={root})", None, world)
    return _run(world, objects.gather_json(value, root, _channel(world)))


def _channel(world: World) -> Channel:
    return Channel(world, world.tags.foreground())


def _run(world: World, waits: Waits[Any]) -> Any:
    return engine_of(world).run(waits, world)


def _flat(tensor: Any, any_dtype: bool = False) -> Buffer:
    """The memory of a user's tensor or array as a 1-D tensor, or an error that says what to do."""
    if isinstance(tensor, numpy.ndarray):
        if not tensor.flags.writeable:
            raise UnsupportedBufferError("a read-only array; the result is written in place")
        if not tensor.flags.c_contiguous:
            raise UnsupportedBufferError(
                f"a non-contiguous array (shape {tensor.shape}, strides {tensor.strides}); pass "
                "numpy.ascontiguousarray(array) and copy the result back"
            )
        try:
            tensor = torch.from_numpy(tensor)
        except (TypeError, ValueError):
            raise UnsupportedBufferError(_bad_dtype(tensor.dtype)) from None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a torch tensor or a numpy array, got {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise UnsupportedBufferError(
            f"a tensor on {tensor.device}; only host memory can be reduced so far. Pass "
            "tensor.cpu() and copy the result back"
        )
    if tensor.layout is not torch.strided:
        raise UnsupportedBufferError(f"a {tensor.layout} tensor; pass tensor.to_dense()")
    if not tensor.is_contiguous():
        raise UnsupportedBufferError(
            f"a non-contiguous tensor (shape {tuple(tensor.shape)}, strides {tensor.stride()}); "
            "pass tensor.contiguous() and copy the result back"
        )
    if not any_dtype and tensor.dtype not in DTYPES:
        raise UnsupportedBufferError(_bad_dtype(tensor.dtype))
    buffer: Buffer = tensor.detach() if tensor.requires_grad else tensor
    return buffer if buffer.dim() == 1 else buffer.view(-1)


def _bad_dtype(dtype: object) -> str:
    listed = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
    return f"{dtype} cannot be reduced; valid are {listed}"


def _describe(tensor: Any) -> str:
    dtype = getattr(tensor, "dtype", type(tensor).__name__)
    return f"{str(dtype).removeprefix('torch.')}{list(getattr(tensor, 'shape', []))}"


def _check_root(root: int, world: World) -> None:
    if not 0 <= root < world.size:
        raise ValueError(f"root {root} is no rank of a world of {world.size}")


def _check_call(
    describe: Callable[[], str],
    problem: Exception | None,
    world: World,
    check: bool | None = None,
) -> None:
    """Raise this rank's problem; with ``check``, another rank's too, or that calls differ."""
    if world.settings.check if check is None else check:
        mine = [describe(), problem and str(problem)]
        calls = _run(world, objects.gather_json(mine, None, _channel(world)))
        failed = [(rank, reason) for rank, (_, reason) in enumerate(calls) if reason]
        descriptions = [description for description, _ in calls]
        if failed and problem is None:
            problem = MismatchError(f"rank {failed[0][0]} could not take part: {failed[0][1]}")
        elif odd_ones(descriptions) and problem is None:
            problem = MismatchError(
                f"ranks called different collectives: {who_has_what(descriptions)}; every rank "
                "must make the same calls, with the same shape, dtype, op and algorithm"
            )
    if problem is not None:
        raise problem
