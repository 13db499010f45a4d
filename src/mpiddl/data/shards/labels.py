"""Labels as users have them, and the small numbers that stand for them here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.errors import DataError

__all__ = ["codes_of", "values_of"]


def codes_of(
    labels: Sequence[Any] | NDArray[Any], length: int | None = None, what: str = "labels"
) -> tuple[NDArray[numpy.int64], NDArray[Any]]:
    """Each label's place among the different ones, and those, sorted.

    Args:
        labels: Integers, booleans or strings, all of one kind: a list, an array (one of objects,
            too, as pandas makes of strings), a tensor on the host.
        length: How many there must be.
        what: What they are called in messages.

    Raises:
        DataError: Not one for each sample, several dimensions, mixed kinds, or numbers that are no
            integers.
    """
    values = values_of(labels, length, what)
    if values.dtype.kind not in "biuUS" and len(values):
        raise DataError(f"{what} must be integers or strings, got {values.dtype}")
    classes, codes = numpy.unique(values, return_inverse=True)
    return codes.astype(numpy.int64, copy=False), classes


def values_of(
    labels: Sequence[Any] | NDArray[Any], length: int | None = None, what: str = "labels"
) -> NDArray[Any]:
    """The same as an array of one dimension, and of the dtype of their one kind.

    Args:
        labels: As for ``codes_of``, or of another kind.
        length: How many there must be.
        what: What they are called in messages.

    Raises:
        DataError: Not one for each sample, several dimensions, or mixed kinds.
    """
    values = numpy.asarray(labels)
    if values.ndim != 1:
        raise DataError(f"{what} must have one dimension, got shape {values.shape}")
    if length is not None and len(values) != length:
        raise DataError(f"{len(values)} {what} for {length} samples: pass one for each")
    vague = values.dtype.kind in "OT"  # objects, or strings of any length
    if vague:
        labels = values.tolist()
    if isinstance(labels, list | tuple):  # numpy would make strings of a list of both
        kinds = {_kind(label) for label in labels}
        if len(kinds) > 1:
            names = ", ".join(sorted({type(label).__name__ for label in labels}))
            raise DataError(f"{what} must all be of one kind, got {names}")
        if vague and kinds <= {"bool", "bytes", "int", "str"}:
            values = numpy.asarray(labels)
    return values


def _kind(label: Any) -> str:
    if isinstance(label, bool | numpy.bool_):
        return "bool"
    if isinstance(label, int | numpy.integer):
        return "int"
    if isinstance(label, str):  # numpy's, too
        return "str"
    return type(label).__name__
