"""Arrays of samples one after the other in one file, as bytes and as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray

from mpiddl.data.moving.shared_files import map_shared
from mpiddl.errors import DataError

__all__ = ["Field", "bytes_of", "kind_of", "lay_out", "views_of"]

ALIGNMENT = 4096

Array = NDArray[Any] | torch.Tensor


class Field(NamedTuple):
    """One of the arrays in the file: torch's name of its dtype, its shape, its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.torch_dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def kind_of(number: int, array: object) -> list[Any]:
    """Dtype and shape of an array that can be shared. Raises: DataError: It cannot."""
    if isinstance(array, numpy.ndarray):
        try:
            dtype = torch.from_numpy(numpy.empty(0, array.dtype)).dtype
        except (TypeError, ValueError):
            raise DataError(
                f"array {number} has dtype {array.dtype}, which torch does not know; convert it "
                "with array.astype(...)"
            ) from None
    elif not isinstance(array, torch.Tensor):
        raise DataError(
            f"array {number} is a {type(array).__name__}; pass numpy arrays or torch tensors"
        )
    elif array.layout is not torch.strided or array.is_quantized or array.is_meta:
        raise DataError(f"tensor {number} is not a plain one ({array.layout}, {array.device})")
    else:
        dtype = array.dtype
    shape = list(array.shape)
    if not shape or 0 in shape:
        raise DataError(f"array {number} has shape {shape}: there are no samples in it")
    return [str(dtype).removeprefix("torch."), shape]


def lay_out(kinds: Iterable[Sequence[Any]]) -> tuple[Field, ...]:
    """Where arrays of such dtypes and shapes are in their file."""
    fields: list[Field] = []
    for dtype, shape in kinds:
        offset = -(-fields[-1].end // ALIGNMENT) * ALIGNMENT if fields else 0
        fields.append(Field(dtype, tuple(shape), offset))
    return tuple(fields)


def bytes_of(array: Array, rows: slice) -> NDArray[numpy.uint8]:
    """Consecutive samples as they lie in the file; copied only where they do not lie so."""
    part = array[rows]
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu().resolve_conj().resolve_neg().contiguous()
        part = part.view(-1).view(torch.uint8).numpy()
    memory: NDArray[numpy.uint8] = numpy.ascontiguousarray(part).reshape(-1).view(numpy.uint8)
    return memory


def views_of(path: Path, fields: Sequence[Field]) -> tuple[torch.Tensor, ...]:
    """The file as tensors. It stays mapped for as long as one of them lives."""
    memory = map_shared(path, fields[-1].end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written to: so it is meant
        return tuple(
            torch.frombuffer(
                memory, dtype=field.torch_dtype, count=prod(field.shape), offset=field.offset
            ).view(field.shape)
            for field in fields
        )
