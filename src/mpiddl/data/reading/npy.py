"""numpy's files: one array in .npy, several in .npz. Arrays of Python objects are refused."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from typing import IO, Any, Literal

import numpy
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from mpiddl.data.reading.files import map_array, reading
from mpiddl.errors import DataError

__all__ = ["read_npy", "read_npz"]

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's member; it ends in the lengths of two fields


def read_npy(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of an .npy file, mapped into memory and read-only.

    Only what is used is read from the disk, and the ranks of a node share one copy in the system's
    cache. Loader workers map the file themselves. It must not change meanwhile.

    Raises:
        DataError: The file is missing, cut off, too long, or none of numpy's; or it holds Python
            objects.
    """
    with reading(path, "an .npy file"), open(path, "rb") as stream:
        return _mapped(path, stream, os.fstat(stream.fileno()).st_size, str(path))


def read_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, by name; read-only.

    Arrays that ``numpy.savez`` wrote are mapped into memory, as with ``read_npy``;
    their lengths are checked, the zip's checksums are not (that would read everything). Arrays that
    ``numpy.savez_compressed`` wrote are loaded, and their checksums tested.

    Raises:
        DataError: The file is missing, cut off, or none of numpy's; or it holds Python objects.
    """
    with (
        reading(path, "an .npz file"),
        open(path, "rb") as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        return {
            info.filename.removesuffix(".npy"): _member(path, stream, archive, info)
            for info in archive.infolist()
        }


def _member(
    path: str | os.PathLike[str],
    stream: IO[bytes],
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
) -> NDArray[Any]:
    name = f"{path}, array {info.filename!r},"
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as unpacked:
            return _loaded(unpacked, info.file_size, name)
    stream.seek(info.header_offset)
    name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    start = stream.seek(name_length + extra_length, os.SEEK_CUR)
    return _mapped(path, stream, start + info.file_size, name)


def _mapped(path: str | os.PathLike[str], stream: IO[bytes], end: int, name: str) -> NDArray[Any]:
    """The array whose header starts where ``stream`` is, and whose data must end at ``end``."""
    dtype, shape, order = _header(stream, name)
    start = stream.tell()
    _check_length(end - start, dtype, shape, name)
    return map_array(path, dtype, shape, start, order)


def _loaded(stream: IO[bytes], length: int, name: str) -> NDArray[Any]:
    """The array of a compressed member of ``length`` bytes."""
    dtype, shape, order = _header(stream, name)
    _check_length(length - stream.tell(), dtype, shape, name)
    data = stream.read()  # to the end, where zipfile tests the checksum
    array: NDArray[Any] = numpy.ndarray(shape, dtype, data, order=order)
    return array


def _header(
    stream: IO[bytes], name: str
) -> tuple[numpy.dtype[Any], tuple[int, ...], Literal["C", "F"]]:
    with reading(name, "in numpy's format"):
        version = npy_format.read_magic(stream)
        if version == (1, 0):
            shape, columns, dtype = npy_format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, columns, dtype = npy_format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"version {version[0]}.{version[1]} of the format is not supported")
    if dtype.hasobject:
        raise DataError(
            f"{name} holds Python objects ({dtype}), which are never loaded, for that could run "
            "foreign code; save numbers or text of a fixed width"
        )
    return dtype, shape, "F" if columns else "C"


def _check_length(nbytes: int, dtype: numpy.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if nbytes != expected:
        what = "is cut off" if nbytes < expected else "is longer than its array"
        raise DataError(
            f"{name} {what}: {nbytes} bytes of data, not the {expected} of {dtype} in shape "
            f"{shape}; copy or write it again"
        )
