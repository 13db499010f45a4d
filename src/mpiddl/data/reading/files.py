"""What all readers do with files: one clear error, and arrays that stay in the file."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy
from numpy.typing import NDArray

from mpiddl.errors import DataError

__all__ = ["map_array", "reading"]

SENT_AS_DATA = 1 << 20
"""Bytes up to which an array goes to another process as data, not as a place in a file."""

# Where in memory byte 0 of a mapped file would be. Views share the map of what they view.
_origins: WeakKeyDictionary[mmap.mmap, int] = WeakKeyDictionary()


@contextmanager
def reading(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Whatever opening and parsing ``path`` raises becomes a DataError that names it.

    Args:
        path: The file that is read inside the ``with``.
        kind: What it should be, "an .npz file".
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except OSError as error:
        if error.errno is None:  # a parser's own
            raise _foreign(path, kind, error) from error
        raise DataError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions, on every "
            "node"
        ) from None
    except Exception as error:  # parsers raise all sorts of things when they meet foreign bytes
        raise _foreign(path, kind, error) from error


def _foreign(path: str | os.PathLike[str], kind: str, error: Exception) -> DataError:
    reason = str(error) or type(error).__name__
    return DataError(f"{path} is not {kind}, or is cut off ({reason}); copy or write it again")


def map_array(
    path: str | os.PathLike[str],
    dtype: numpy.dtype[Any],
    shape: tuple[int, ...],
    offset: int = 0,
    order: Literal["C", "F"] = "C",
) -> NDArray[Any]:
    """An array in a file, mapped into memory. What is used is read; nothing can be written.

    Loader workers map the file too: what they are sent is its name, not its data.

    Args:
        path: The file; must not change while the array lives.
        dtype: Of the elements.
        shape: Of the array; the file must be long enough.
        offset: Bytes before the first element.
        order: "C" for rows, "F" for columns that lie together.
    """
    if math.prod(shape) * dtype.itemsize == 0:  # nothing to map, which the system refuses
        empty = numpy.empty(shape, dtype)
        empty.flags.writeable = False
        return empty
    with reading(path, "long enough for its array"):
        array = numpy.memmap(path, dtype, "r", offset, shape, order)
    _origins[array._mmap] = array.ctypes.data - offset  # type: ignore[attr-defined]
    return array


def _for_another_process(array: numpy.memmap[Any, Any]) -> Any:
    """How multiprocessing sends an array; saving it to a file still writes its data."""
    mapping = getattr(array, "_mmap", None)  # none in copies, which are memmaps, too
    origin = None if mapping is None else _origins.get(mapping)
    together = array.flags.c_contiguous or array.flags.f_contiguous
    if origin is None or not together or array.nbytes <= SENT_AS_DATA:
        return numpy.asarray(array).__reduce__()
    offset = array.ctypes.data - origin
    order = "C" if array.flags.c_contiguous else "F"
    return map_array, (array.filename, array.dtype, array.shape, offset, order)


ForkingPickler.register(numpy.memmap, _for_another_process)
