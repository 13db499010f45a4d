"""Tables in CSV files: numbers under names, and a column of labels."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy
from numpy.typing import DTypeLike, NDArray

from mpiddl.data.reading.files import reading
from mpiddl.data.reading.lines import check_encoding, decode
from mpiddl.errors import DataError

__all__ = ["Table", "read_csv"]


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers under names.

    Attributes:
        names: Of the columns.
        values: The numbers, (rows, columns).
        labels: Each row's class, as its place in ``classes``: int64, (rows,); None without labels.
        classes: What the labels are called.
    """

    names: tuple[str, ...]
    values: NDArray[Any]
    labels: NDArray[numpy.int64] | None = None
    classes: tuple[str, ...] = ()


def read_csv(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    label: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    dtype: DTypeLike = "float64",
    delimiter: str = ",",
    encoding: str = "utf-8",
) -> Table:
    """Numbers, and labels, of a CSV file whose first line names its columns.

        train = mpiddl.data.read_csv("train.csv", label="species")
        test = mpiddl.data.read_csv("test.csv", label="species", classes=train.classes)

    "nan" and "inf" are numbers; an empty field is none. Empty lines are skipped. With a dtype of
    integers every field must be one that fits: 1.7 and 1.0 are refused, and 300 for uint8.

    Args:
        path: The file.
        columns: Which columns, in which order; default all but the label's, as in the file.
        label: The column of labels: any text or whole numbers.
        classes: The labels there may be, in the order of their codes; default those found,
            sorted, as numbers if all are whole numbers. Pass the training table's for a test
            table, so that codes mean the same.
        dtype: Of the values: floats, integers or booleans (0 and 1).
        delimiter: Between the fields.
        encoding: Of the text.

    Raises:
        DataError: The file is missing, empty or no CSV; a name is missing, unknown or there twice;
            a row is too long or too short; a field is no number, or none of the dtype, or a label
            unknown. It names line and column.
    """
    check_encoding(encoding)
    kind = _kind_of(numpy.dtype(dtype))
    with reading(path, "a CSV file"), open(path, "rb") as stream:
        rows = _rows(stream, path, delimiter, encoding)
        _, header = next(rows, (0, []))
        names = _names(header, path)
        wanted = _wanted(names, columns, label, path)
        places = [names.index(name) for name in wanted]
        label_place = None if label is None else _place(label, names, path)
        cells: array[Any] = array(kind.cells)
        texts, lines = list[str](), array("q")
        for line, row in rows:
            if len(row) != len(names):
                raise DataError(
                    f"{path}, line {line}: {len(row)} fields, but {len(names)} names in the "
                    "header; mend the line"
                )
            cells.extend(_numbers(row, places, kind, names, path, line))
            if label_place is not None:
                texts.append(row[label_place].strip())
            lines.append(line)
    if not lines:
        raise DataError(f"{path} has no rows, only names; check what wrote it")
    values = numpy.array(cells, dtype).reshape(len(lines), len(places))
    if label is None:
        return Table(wanted, values)
    known = _classes(texts) if classes is None else tuple(classes)
    return Table(wanted, values, _codes(texts, known, label, lines, path), known)


def _rows(
    stream: IO[bytes], path: str | os.PathLike[str], delimiter: str, encoding: str
) -> Iterator[tuple[int, list[str]]]:
    """Rows with fields, and the number of the line on which each ends."""

    def text() -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            if b"\0" in line:
                raise DataError(
                    f"{path}, line {number}: a NUL byte; a CSV file is plain text (if this is "
                    "UTF-16, convert it: iconv -f UTF-16 -t UTF-8)"
                )
            yield decode(line, encoding, path, number)

    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}; mend the line (an open quotation mark?)"
        ) from None


def _names(header: list[str], path: str | os.PathLike[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in header)
    if not names:
        raise DataError(f"{path} is empty; a line of names and rows of numbers are needed")
    if all(_is_number(name) for name in names):
        raise DataError(f"{path}: line 1 is all numbers; put a line with the columns' names first")
    for place, name in enumerate(names):
        if not name:
            raise DataError(
                f"{path}: column {place + 1} has no name; give it one (pandas writes such a "
                "column unless index=False)"
            )
        if name in names[:place]:
            raise DataError(f"{path}: two columns are called {name!r}; rename one")
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _wanted(
    names: tuple[str, ...],
    columns: Sequence[str] | None,
    label: str | None,
    path: str | os.PathLike[str],
) -> tuple[str, ...]:
    """Names of the columns of numbers."""
    if columns is None:
        return tuple(name for name in names if name != label)
    wanted = (columns,) if isinstance(columns, str) else tuple(columns)
    for name in wanted:
        _place(name, names, path)
    if len({*wanted}) < len(wanted) or label in wanted:
        raise DataError(f"a column is wanted twice: columns={list(wanted)}, label={label!r}")
    return wanted


def _place(name: str, names: tuple[str, ...], path: str | os.PathLike[str]) -> int:
    if name not in names:
        raise DataError(f"{path} has no column {name!r}; it has {', '.join(names)}")
    return names.index(name)


@dataclass(frozen=True)
class _Kind:
    """What a field must be.

    Attributes:
        what: In words.
        number_of: Makes the number of a field; raises ValueError if it is none.
        cells: The typecode of an array that holds any such number exactly.
    """

    what: str
    number_of: Callable[[str], float]
    cells: str


def _kind_of(dtype: numpy.dtype[Any]) -> _Kind:
    if dtype.kind == "f":
        return _Kind("a number", float, "d")
    if dtype.kind not in "biu":
        raise DataError(f"dtype must be of floats, integers or booleans, got {dtype}")
    low, high = 0, 1
    if dtype.kind != "b":
        low, high = int(numpy.iinfo(dtype).min), int(numpy.iinfo(dtype).max)

    def whole(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError
        return number

    what = f"a whole number from {low} to {high}, as {dtype.name} needs"
    return _Kind(what, whole, "q" if dtype.kind == "i" else "Q")


def _numbers(
    row: list[str],
    places: list[int],
    kind: _Kind,
    names: tuple[str, ...],
    path: str | os.PathLike[str],
    line: int,
) -> list[float]:
    place = 0
    try:
        numbers = []
        for place in places:
            if "_" in row[place]:  # Python's float() and int() would skip it
                raise ValueError
            numbers.append(kind.number_of(row[place]))
        return numbers
    except ValueError:
        raise DataError(
            f"{path}, line {line}, column {names[place]!r}: {row[place]!r} is not {kind.what}; "
            "mend it, or leave the column out of columns="
        ) from None


def _classes(texts: list[str]) -> tuple[str, ...]:
    found = sorted({*texts})
    with suppress(ValueError):
        found.sort(key=int)
    return tuple(found)


def _codes(
    texts: list[str],
    classes: tuple[str, ...],
    label: str,
    lines: Sequence[int],
    path: str | os.PathLike[str],
) -> NDArray[numpy.int64]:
    codes = {name: code for code, name in enumerate(classes) if name}
    for line, text in zip(lines, texts, strict=True):
        if text not in codes:
            raise DataError(
                f"{path}, line {line}, column {label!r}: {text!r} is "
                + (f"none of the classes {', '.join(classes)}" if text else "no label")
                + "; mend it"
            )
    return numpy.array([codes[text] for text in texts], numpy.int64)
