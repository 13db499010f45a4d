"""Labels as users have them, and the small numbers that stand for them here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.errors import DataError

__all__ = ["codes_of"]


def codes_of(
    labels: Sequence[Any] | NDArray[Any], length: int | None = None, what: str = "labels"
) -> tuple[NDArray[numpy.int64], NDArray[Any]]:
    """Each label's place among the different ones, and those, sorted.

    Args:
        labels: Integers, booleans or strings, all of one kind: a list, an array, a tensor on the
            host.
        length: How many there must be.
        what: What they are called in messages.

    Raises:
        DataError: Not one for each sample, several dimensions, mixed kinds, or numbers that are no
            integers.
    """
    values = numpy.asarray(labels)
    if values.ndim != 1:
        raise DataError(f"{what} must have one dimension, got shape {values.shape}")
    if length is not None and len(values) != length:
        raise DataError(f"{len(values)} {what} for {length} samples: pass one for each")
    if isinstance(labels, list | tuple):  # numpy would make strings of a list of both
        kinds = {_kind(label) for label in labels}
        if len(kinds) > 1:
            names = ", ".join(sorted({type(label).__name__ for label in labels}))
            raise DataError(f"{what} must all be of one kind, got {names}")
    if values.dtype.kind not in "biuUS" and len(values):
        raise DataError(f"{what} must be integers or strings, got {values.dtype}")
    classes, codes = numpy.unique(values, return_inverse=True)
    return codes.astype(numpy.int64, copy=False), classes


def _kind(label: Any) -> str:
    if isinstance(label, bool | numpy.bool_):
        return "bool"
    if isinstance(label, int | numpy.integer):
        return "int"
    return type(label).__name__
