"""Plain text, a line a sample."""

from __future__ import annotations

import mmap
import operator
import os
from typing import Any, SupportsIndex

import numpy
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mpiddl.data.reading.files import reading
from mpiddl.data.reading.lines import check_encoding, decode
from mpiddl.errors import DataError

__all__ = ["TextLines"]

_PIECE = 16 << 20  # bytes that are searched for line ends at a time


class TextLines(Dataset[str]):
    """The lines of a text file, by number, without the text in memory.

    The file is mapped; only where lines end is remembered (8 bytes a line, which loader workers
    share). Line ends are not part of the lines. The file must not change meanwhile.

    Args:
        path: The file.
        encoding: Of the text: one in which a line ends in the byte 10, such as UTF-8, Latin-1,
            Shift JIS or GBK.

    Raises:
        DataError: The file is missing or empty. When a line is read: it is not in this encoding,
            or the file has changed its length.
    """

    def __init__(self, path: str | os.PathLike[str], encoding: str = "utf-8") -> None:
        self.path = os.path.abspath(path)
        self.encoding = encoding
        check_encoding(encoding)
        self._text = self._open()
        self._length = len(self._text)
        self._ends = torch.from_numpy(_line_ends(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: SupportsIndex) -> str:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"line {number} of {len(self)}")
        number %= len(self)
        start = int(self._ends[number - 1]) if number else 0
        line = self._text[start : int(self._ends[number])]
        text = decode(line, self.encoding, self.path, number + 1)
        return text.removesuffix("\n").removesuffix("\r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_text"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._text = self._open()
        if len(self._text) != self._length:
            raise DataError(
                f"{self.path} has {len(self._text)} bytes, and had {self._length} when it was "
                "opened; do not change it while it is read"
            )

    def _open(self) -> mmap.mmap:
        with reading(self.path, "a text file"), open(self.path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise DataError(f"{self.path} is empty; a line at least is needed")
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _line_ends(text: mmap.mmap) -> NDArray[numpy.int64]:
    """Where each line ends, its line end included."""
    ends = []
    for start in range(0, len(text), _PIECE):
        piece = numpy.frombuffer(text[start : start + _PIECE], numpy.uint8)
        ends.append(numpy.flatnonzero(piece == ord("\n")) + (start + 1))
    found = numpy.concatenate(ends).astype(numpy.int64, copy=False)
    unended = len(found) == 0 or found[-1] != len(text)
    return numpy.append(found, len(text)) if unended else found
