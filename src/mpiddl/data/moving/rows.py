"""Samples as rows of bytes: what travels when data are shared out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray

from mpiddl.data.shards.permutation import Indices
from mpiddl.errors import DataError

__all__ = ["Kind", "Rows", "as_rows", "kind_of_rows", "room_for", "take"]

Rows = NDArray[numpy.uint8]
"""Shape: (samples, bytes of one)."""


class Kind(NamedTuple):
    """What rows are made of; plain JSON.

    Attributes:
        package: ``numpy`` or ``torch``.
        dtype: Its name there.
        shape: Of one sample.
    """

    package: str
    dtype: str
    shape: list[int]


def kind_of_rows(samples: Any) -> Kind:
    """Of an array or a tensor on the host whose first dimension counts samples.

    Raises:
        DataError: It is something else, or holds Python objects.
    """
    if isinstance(samples, torch.Tensor):
        if samples.device.type != "cpu" or samples.layout is not torch.strided:
            raise DataError("samples must be a dense tensor on the host; pass samples.cpu()")
        kind = Kind("torch", str(samples.dtype).removeprefix("torch."), list(samples.shape[1:]))
    elif isinstance(samples, numpy.ndarray):
        if samples.dtype.hasobject:
            raise DataError("an array of Python objects cannot travel; pass numbers, or bytes")
        if samples.dtype.kind == "V":
            raise DataError("an array of records cannot travel; pass its fields, one by one")
        kind = Kind("numpy", samples.dtype.str, list(samples.shape[1:]))
    else:
        raise DataError(f"expected a numpy array or a torch tensor, got {type(samples).__name__}")
    if samples.ndim == 0:
        raise DataError("samples need a first dimension that counts them")
    return kind


def as_rows(samples: Any) -> Rows | None:
    """The same memory; None if it is not contiguous."""
    length, shape = len(samples), samples.shape[1:]
    if isinstance(samples, torch.Tensor):
        if not samples.is_contiguous():
            return None
        nbytes = samples.dtype.itemsize * math.prod(shape)
        if length * nbytes == 0:  # whose strides mean nothing
            return numpy.empty((length, nbytes), dtype=numpy.uint8)
        raw = samples.detach().view(-1).view(torch.uint8).numpy()
    else:
        if not samples.flags.c_contiguous:
            return None
        nbytes = samples.dtype.itemsize * math.prod(shape)
        raw = samples.reshape(-1).view(numpy.uint8)
    rows: Rows = raw.reshape(length, nbytes)
    return rows


def room_for(length: int, kind: Kind, own: Any = None, source: Any = None) -> tuple[Any, Rows]:
    """Where ``length`` samples go, and the same memory as rows.

    Raises:
        DataError: The caller's ``own`` array is not for those, or shares memory with ``source``.
    """
    samples: Any = own
    if own is None and kind.package == "torch":
        dtype = getattr(torch, kind.dtype)
        samples = torch.empty((length, *kind.shape), dtype=dtype, device="cpu")
    elif own is None:
        samples = numpy.empty((length, *kind.shape), dtype=numpy.dtype(kind.dtype))
    elif kind_of_rows(own) != kind or len(own) != length:
        raise DataError(
            f"out must hold {length} samples of {kind.dtype}{kind.shape} and be of {kind.package}"
        )
    rows = as_rows(samples)
    if rows is None or not rows.flags.writeable:
        raise DataError("out must be contiguous, and may be written to")
    if own is not None and source is not None and _bounds(own) & _bounds(source):
        raise DataError("out shares memory with the samples; pass another array")
    return samples, rows


def _bounds(samples: Any) -> set[int]:
    """What stands for its memory: arrays that share some of it have one of these in common."""
    if isinstance(samples, torch.Tensor):
        return {samples.untyped_storage().data_ptr()} - {0}
    while isinstance(samples.base, numpy.ndarray):
        samples = samples.base
    return {samples.__array_interface__["data"][0]} if samples.size else set()


def take(samples: Any) -> Callable[[Indices, Rows], None]:
    """What copies the samples of some indices into rows."""
    rows = as_rows(samples)
    if rows is not None:

        def gather(indices: Indices, out: Rows) -> None:
            numpy.take(rows, indices, axis=0, out=out, mode="clip")  # which copies row by row

        return gather

    def copy(indices: Indices, out: Rows) -> None:
        part = samples[indices]
        tensor = isinstance(part, torch.Tensor)
        gathered = as_rows(part.contiguous() if tensor else numpy.ascontiguousarray(part))
        assert gathered is not None
        out[:] = gathered

    return copy
