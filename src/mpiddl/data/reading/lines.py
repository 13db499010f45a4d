"""Lines of text files: bytes made into text, with errors that name the line."""

from __future__ import annotations

import os

from mpiddl.errors import DataError

__all__ = ["check_encoding", "decode"]


def check_encoding(encoding: str) -> None:
    """Raises DataError unless ``encoding`` exists and its lines end in the byte 10, as in ASCII."""
    try:
        findable = "\n".encode(encoding) == b"\n"
    except LookupError:
        raise DataError(f"encoding {encoding!r} is unknown; use 'utf-8'") from None
    if not findable:
        raise DataError(
            f"lines cannot be found in {encoding} text; convert the file to UTF-8 "
            f"(iconv -f {encoding} -t UTF-8)"
        )


def decode(line: bytes, encoding: str, path: str | os.PathLike[str], number: int) -> str:
    """The text of line ``number`` (from 1) of ``path``, without a byte order mark.

    Raises:
        DataError: The bytes are no text in this encoding.
    """
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte {line[error.start]:#04x} is not {encoding} text; pass "
            "encoding=, or convert the file to UTF-8"
        ) from None
    return text.removeprefix("\ufeff") if number == 1 else text
