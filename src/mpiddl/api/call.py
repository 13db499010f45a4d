"""What all calls share: a user's arguments checked, compared between ranks, started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy
import torch

from mpiddl.base.segments import split
from mpiddl.base.units import integer
from mpiddl.base.waits import Waits
from mpiddl.collectives import objects
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.node.lanes import Foreground
from mpiddl.collectives.reduction import DTYPES
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.host import HOST
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import engine_of
from mpiddl.engine.work import Work
from mpiddl.errors import MismatchError, UnsupportedBufferError
from mpiddl.gradients.agreement import odd_ones, who_has_what
from mpiddl.observe import activity

__all__ = [
    "TensorOrArray",
    "check_apart",
    "check_call",
    "check_length",
    "check_root",
    "check_same_dtype",
    "describe_buffer",
    "describe_dtype",
    "flat",
    "launch",
    "new_channel",
    "parts_of",
    "run",
    "same_memory",
    "start",
]

T = TypeVar("T")
TensorOrArray = TypeVar("TensorOrArray", torch.Tensor, numpy.ndarray[Any, Any])


_async_works: WeakKeyDictionary[World, WeakValueDictionary[int, Work]] = WeakKeyDictionary()
"""By tag; works that are complete, and that nobody keeps, are gone."""


def new_channel(world: World, lanes: Foreground | None = None) -> Channel:
    """The messages of one collective, which every rank starts as its next, and its lane.

    Tags are used again. What still runs on this rank with the same tag is completed first, or
    its messages would be taken for the new one's.

    Raises:
        NestedCallError: The caller is itself part of a collective. It has no tag, and no place in
            a lane's queue, which nobody would leave.
    """
    activity.refuse_nested()
    tag = world.tags.foreground()
    works = _async_works.get(world)
    earlier = works.get(tag) if works else None
    if earlier is not None and not earlier.complete:
        engine_of(world).drive([earlier])
    return Channel(world, tag, lane=lanes.next() if lanes else None)


def run(world: World, waits: Waits[Any], device: Device = HOST) -> Any:
    """Run a collective to its end; return its result."""
    return engine_of(world).run(waits, world, device)


def launch(
    waits: Waits[Any], world: World, result: T, async_: bool, device: Device = HOST
) -> T | Work:
    """A ``Work`` that returns ``result``, or, once it is complete, ``result``."""
    if async_:
        return engine_of(world).submit(waits, world, result=result, device=device)
    engine_of(world).run(waits, world, device)
    return result


def start(
    waits: Waits[Any], world: World, result: T, async_: bool, device: Device = HOST
) -> T | Work:
    """As ``launch``, for a collective on the channel that was made last."""
    started = launch(waits, world, result, async_, device)
    if isinstance(started, Work):
        _async_works.setdefault(world, WeakValueDictionary())[world.tags.last] = started
    return started


def flat(tensor: Any, any_dtype: bool = False) -> Buffer:
    """The memory of a user's tensor or array as a 1-D tensor, or an error that says what to do."""
    if isinstance(tensor, numpy.ndarray):
        if not tensor.flags.writeable:
            raise UnsupportedBufferError("a read-only array; pass array.copy()")
        # numpy calls one element contiguous whatever its stride, torch takes no negative one.
        if not tensor.flags.c_contiguous or min(tensor.strides, default=0) < 0:
            raise UnsupportedBufferError(
                f"a non-contiguous array (shape {tensor.shape}, strides {tensor.strides}); pass "
                "numpy.ascontiguousarray(array) and copy the result back"
            )
        try:
            tensor = torch.from_numpy(tensor)
        except (TypeError, ValueError):
            raise UnsupportedBufferError(_bad_dtype(tensor.dtype)) from None
    elif type(tensor).__module__.partition(".")[0] == "cupy":
        tensor = _from_cupy(tensor)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"expected a torch tensor, a numpy or a CuPy array, got {type(tensor).__name__}"
        )
    if tensor.layout is not torch.strided:
        raise UnsupportedBufferError(f"a {tensor.layout} tensor; pass tensor.to_dense()")
    if not tensor.is_contiguous():
        raise UnsupportedBufferError(
            f"a non-contiguous tensor (shape {tuple(tensor.shape)}, strides {tensor.stride()}); "
            "pass tensor.contiguous() and copy the result back"
        )
    if tensor.is_conj() or tensor.is_neg():  # a mark: the memory holds other values
        raise UnsupportedBufferError(
            "a conjugated or negated view; pass tensor.resolve_conj().resolve_neg() and copy the "
            "result back"
        )
    if not any_dtype and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise UnsupportedBufferError(
            "an inference tensor outside torch.inference_mode(); call inside it, or pass "
            "tensor.clone() and copy the result back"
        )
    if not any_dtype and tensor.dtype not in DTYPES:
        raise UnsupportedBufferError(_bad_dtype(tensor.dtype))
    device_of(tensor)
    buffer: Buffer = tensor.detach() if tensor.requires_grad else tensor
    return buffer if buffer.dim() == 1 else buffer.view(-1)


def _from_cupy(array: Any) -> torch.Tensor:
    """The same memory. torch's stream waits for what CuPy was asked so far."""
    if not array.flags.c_contiguous:
        raise UnsupportedBufferError(
            f"a non-contiguous array (shape {array.shape}, strides {array.strides}); pass "
            "cupy.ascontiguousarray(array) and copy the result back"
        )
    try:
        tensor: torch.Tensor = torch.from_dlpack(array)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError, BufferError):
        raise UnsupportedBufferError(_bad_dtype(array.dtype)) from None
    return tensor


def _bad_dtype(dtype: object) -> str:
    listed = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
    return f"{dtype} cannot be reduced; valid are {listed}"


def describe_buffer(tensor: Any) -> str:
    """Dtype and shape, as errors show them, and where it is if that is not the host."""
    place = getattr(getattr(tensor, "device", None), "type", "cpu")
    on = "" if place == "cpu" else f" on {place}"
    return f"{describe_dtype(tensor)}{list(getattr(tensor, 'shape', []))}{on}"


def describe_dtype(tensor: Any) -> str:
    """Dtype, as errors show it."""
    dtype = getattr(tensor, "dtype", type(tensor).__name__)
    return str(dtype).removeprefix("torch.")


def check_root(root: int, world: World) -> int:
    """``root``. Raises: ValueError: It is no rank. TypeError: It is no integer."""
    root = integer(root, "root")
    if not 0 <= root < world.size:
        raise ValueError(f"root {root} is no rank of a world of {world.size}")
    return root


def check_same_dtype(output: Buffer, buffer: Buffer) -> None:
    """Raises: ValueError: Dtypes or devices differ; nothing is converted on the way."""
    if output.device != buffer.device:
        raise ValueError(
            f"output is on {output.device}, input on {buffer.device}; pass two on one device"
        )
    if output.dtype != buffer.dtype:
        raise ValueError(
            f"output is {describe_dtype(output)}, input {describe_dtype(buffer)}; pass two of one "
            "dtype"
        )


def check_apart(output: Buffer, buffer: Buffer, own: bool = False) -> None:
    """Raises: ValueError: Output and input overlap, unless output is its own part of input."""
    first = max(output.data_ptr(), buffer.data_ptr())
    last = min(output.data_ptr() + output.nbytes, buffer.data_ptr() + buffer.nbytes)
    if first < last and not own:
        raise ValueError("output and input overlap in memory; pass a copy of the input")


def check_length(own: Buffer, part: Buffer, world: World, own_name: str, name: str) -> None:
    """Raises: ValueError: A rank's own buffer and its part of the whole differ in length."""
    if len(own) != len(part):
        raise ValueError(
            f"{own_name} has {len(own)} elements for rank {world.rank}, but {len(part)} of "
            f"{name} are its part; pass lengths that fit"
        )


def same_memory(one: Buffer, other: Buffer) -> bool:
    """Whether two buffers are the very same elements."""
    return one.data_ptr() == other.data_ptr() and len(one) == len(other)


def parts_of(
    buffer: Buffer, lengths: Sequence[int] | None, world: World, name: str, what: str
) -> list[Buffer]:
    """One part of ``buffer`` per rank, one after the other.

    Args:
        buffer: All parts.
        lengths: Of the parts, in elements; None: all the same.
        world: The ranks.
        name: Of the argument ``lengths``, for errors.
        what: Of the argument ``buffer``, for errors.

    Raises:
        ValueError: The lengths are not one for each rank, or the buffer has another length.
    """
    if lengths is None:
        if len(buffer) % world.size:
            raise ValueError(
                f"{what} has {len(buffer)} elements, which {world.size} ranks cannot share evenly; "
                f"pass {name}=[...], elements per rank"
            )
        return [buffer[part] for part in split(len(buffer), world.size)]
    lengths = [integer(length, name) for length in lengths]
    if len(lengths) != world.size or min(lengths) < 0:
        raise ValueError(f"{name}={list(lengths)} must be {world.size} lengths, one for each rank")
    if sum(lengths) != len(buffer):
        raise ValueError(
            f"{name}={list(lengths)} adds up to {sum(lengths)}, but {what} has {len(buffer)} "
            "elements"
        )
    return [buffer[first:last] for first, last in pairwise([0, *accumulate(lengths)])]


def check_call(
    describe: Callable[[], str],
    problem: Exception | None,
    world: World,
    check: bool | None = None,
    lengths: tuple[list[int], list[int]] | None = None,
) -> None:
    """Raise this rank's problem; with ``check``, another rank's too, or that calls differ.

    ``lengths`` are those of an all-to-all, to each rank and from each: what one sends, another
    must expect.
    """
    if world.settings.check if check is None else check:
        mine = [describe(), problem and str(problem), lengths]
        calls = run(world, objects.gather_json(mine, None, new_channel(world)))
        failed = [(rank, reason) for rank, (_, reason, _) in enumerate(calls) if reason]
        descriptions = [description for description, _, _ in calls]
        if failed and problem is None:
            problem = MismatchError(f"rank {failed[0][0]} could not take part: {failed[0][1]}")
        elif odd_ones(descriptions) and problem is None:
            problem = MismatchError(
                f"ranks called different collectives: {who_has_what(descriptions)}; every rank "
                "must make the same calls, with the same shape, dtype, op and algorithm"
            )
        elif lengths is not None and problem is None:
            problem = _unexpected([lengths for _, _, lengths in calls])
    if problem is not None:
        raise problem


def _unexpected(lengths: Sequence[tuple[list[int], list[int]]]) -> MismatchError | None:
    """An all-to-all in which a rank sends what its peer does not expect."""
    for sender, (outgoing, _) in enumerate(lengths):
        for receiver, (_, incoming) in enumerate(lengths):
            if outgoing[receiver] != incoming[sender]:
                return MismatchError(
                    f"rank {sender} sends {outgoing[receiver]} elements to rank {receiver}, which "
                    f"expects {incoming[sender]}; its output_lengths[{sender}] must be rank "
                    f"{sender}'s input_lengths[{receiver}]"
                )
    return None
