"""MNIST's format: a header of sizes, then the elements."""

from __future__ import annotations

import gzip
import math
import os
from io import BufferedIOBase
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.data.reading.files import map_array, reading
from mpiddl.errors import DataError

__all__ = ["read_idx"]

_DTYPES: dict[int, numpy.dtype[Any]] = {
    0x08: numpy.dtype(">u1"),
    0x09: numpy.dtype(">i1"),
    0x0B: numpy.dtype(">i2"),
    0x0C: numpy.dtype(">i4"),
    0x0D: numpy.dtype(">f4"),
    0x0E: numpy.dtype(">f8"),
}


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of an IDX file, the format of MNIST; packed with gzip or not. Read-only.

        images = mpiddl.data.read_idx("train-images-idx3-ubyte.gz")   # uint8, (60000, 28, 28)

    Bytes that are not packed are mapped into memory, as with ``read_npy``; everything else is
    loaded, in this machine's byte order.

    Raises:
        DataError: The file is missing, cut off, too long, or no IDX file.
    """
    with reading(path, "an IDX file"), open(path, "rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            stream.seek(0)
            with gzip.GzipFile(fileobj=stream) as unpacked:
                return _loaded(path, unpacked, *_header(path, unpacked))
        stream.seek(0)
        dtype, shape = _header(path, stream)
        if dtype.itemsize > 1:
            return _loaded(path, stream, dtype, shape)
        start = stream.tell()
        _check_length(path, os.fstat(stream.fileno()).st_size - start, dtype, shape)
        return map_array(path, dtype, shape, start)


def _header(
    path: str | os.PathLike[str], stream: BufferedIOBase
) -> tuple[numpy.dtype[Any], tuple[int, ...]]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or magic[3] == 0:
        raise DataError(f"{path} is not an IDX file: it starts with {magic!r}; check what it is")
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path} is cut off in its header; copy it again")
    return _DTYPES[magic[2]], tuple(numpy.frombuffer(sizes, ">u4").tolist())


def _loaded(
    path: str | os.PathLike[str],
    stream: BufferedIOBase,
    dtype: numpy.dtype[Any],
    shape: tuple[int, ...],
) -> NDArray[Any]:
    data = stream.read()  # to the end, where gzip tests its checksum
    _check_length(path, len(data), dtype, shape)
    array = numpy.frombuffer(data, dtype).reshape(shape)
    native = array.astype(dtype.newbyteorder("="), copy=False)
    native.flags.writeable = False
    return native


def _check_length(
    path: str | os.PathLike[str], nbytes: int, dtype: numpy.dtype[Any], shape: tuple[int, ...]
) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if nbytes != expected:
        what = "is cut off" if nbytes < expected else "is too long"
        raise DataError(
            f"{path} {what}: {nbytes} bytes after the header, not the {expected} of {dtype.name} "
            f"in shape {shape}; copy it again"
        )
