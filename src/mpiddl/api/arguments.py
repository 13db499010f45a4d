"""The tensors and numbers that users pass, looked at before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy
import torch

from mpiddl.base.segments import split
from mpiddl.base.units import integer
from mpiddl.collectives.reduction import DTYPES
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of
from mpiddl.errors import UnsupportedBufferError

__all__ = [
    "check_apart",
    "check_length",
    "check_root",
    "check_same_dtype",
    "describe_buffer",
    "describe_dtype",
    "describe_parts",
    "flat",
    "parts_of",
    "roots_parts",
    "same_memory",
]


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
    """A torch tensor of the same memory. torch's stream waits for what CuPy was asked so far."""
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
        buffer: The memory of all parts.
        lengths: The length of each part, in elements; None: all parts are equally long.
        world: The ranks that have the parts.
        name: What users call the argument ``lengths``, for errors.
        what: What users call the argument ``buffer``, for errors.

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


def roots_parts(
    everything: Any,
    own: Buffer,
    lengths: Sequence[int] | None,
    world: World,
    name: str,
    own_name: str,
) -> list[Buffer]:
    """The parts of all ranks in the root's tensor, of which its ``own`` is one.

    Raises:
        ValueError: There is no such tensor, or ``own`` does not fit to it.
    """
    if everything is None:
        raise ValueError(f"rank {world.rank} is the root and must pass {name}, not None")
    whole = flat(everything, any_dtype=True)
    check_same_dtype(*((whole, own) if name == "output" else (own, whole)))
    parts = parts_of(whole, lengths, world, "lengths", name)
    check_length(own, parts[world.rank], world, own_name, name)
    check_apart(whole, own, own=same_memory(own, parts[world.rank]))
    return parts


def describe_parts(lengths: Sequence[int] | None, tensor: Any) -> str:
    """What ranks must agree on where each has a part of the whole, as errors show it."""
    if lengths is None:
        return describe_buffer(tensor)
    return f"{describe_dtype(tensor)} in parts of {list(lengths)}"
