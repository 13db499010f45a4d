"""A random order of a range that nobody has to hold: a place is computed when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

__all__ = ["Indices", "Permutation"]

Indices = NDArray[numpy.int64]

ROUNDS = 6
SMALL = 4096
"""Up to here the order is drawn outright, and every one of them is equally likely."""
PIECE = 1 << 14
"""Places computed at a time: what is in work stays in the cache."""


class Permutation:
    """A bijection of ``range(length)`` onto itself, chosen by ``key``.

    A place is a cell of a table of about sqrt(length) rows and columns. Each round moves the
    cells of a column by a random distance, and then those of a row, the distances coming from two
    short lists: a Feistel network over the two coordinates, whose round functions are truly random
    lists. A cell that is left over (the table may be a little larger than the range) is moved on
    until it falls into the range. Memory: some 12 lists of sqrt(length) numbers.

    Args:
        length: Of the range, below 2**48.
        key: Numbers that choose the order, none negative: seed and epoch, say.

    Source:
        Luby & Rackoff, SIAM J. Comput. 17(2), 1988 (the network); Black & Rogaway, CT-RSA 2002
        (any range, and moving on).
    """

    def __init__(self, length: int, key: Sequence[int]) -> None:
        if not 0 <= length < 1 << 48:
            raise ValueError(f"a range of {length} cannot be permuted")
        self.length = length
        random = numpy.random.Generator(numpy.random.Philox(numpy.random.SeedSequence(key)))
        self._outright: Indices | None = None
        if length <= SMALL:
            self._outright = random.permutation(length)
            return
        self._columns = math.isqrt(length - 1) + 1
        self._rows = -(-length // self._columns)
        # By how much the other coordinate moves, for each value of this one.
        self._moves = [
            random.integers(0, moved, size=mover, dtype=numpy.int32)
            for moved, mover in [(self._rows, self._columns), (self._columns, self._rows)]
            * (ROUNDS // 2)
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice) -> Indices:
        """What is at consecutive places. Shape: (number of places,)."""
        start, stop, step = places.indices(self.length)
        if step < 1:
            raise ValueError("places are asked for in ascending order")
        if self._outright is not None:
            part: Indices = self._outright[places].copy()
            return part
        length = len(range(start, stop, step))
        result = numpy.empty(length, dtype=numpy.int64)
        for at in range(0, length, PIECE):
            piece = result[at : at + PIECE]
            first = start + at * step
            self._through(
                numpy.arange(first, first + len(piece) * step, step, dtype=self._wide), piece, False
            )
        return result

    def at(self, places: NDArray[Any]) -> Indices:
        """What is at each of ``places``. Same shape, one dimension."""
        return self._each(places, False)

    def places_of(self, indices: NDArray[Any]) -> Indices:
        """Where each of ``indices`` is: the inverse of ``at``."""
        return self._each(indices, True)

    def _each(self, numbers: NDArray[Any], backwards: bool) -> Indices:
        if self._outright is not None:
            table = numpy.argsort(self._outright) if backwards else self._outright
            found: Indices = table[numbers]
            return found
        result = numpy.empty(len(numbers), dtype=numpy.int64)
        for at in range(0, len(numbers), PIECE):
            piece = numbers[at : at + PIECE].astype(self._wide)
            self._through(piece, result[at : at + PIECE], backwards)
        return result

    @property
    def _wide(self) -> numpy.dtype[Any]:
        """Divisions of shorter numbers are faster."""
        return numpy.dtype("i4" if self.length + 2 * self._columns < 1 << 31 else "i8")

    def _through(self, numbers: NDArray[Any], result: Indices, backwards: bool) -> None:
        """Move each cell; those that end outside of the range once more."""
        row = (numbers // self._columns).astype(numpy.int32, copy=False)
        column = (numbers - row * numbers.dtype.type(self._columns)).astype(numpy.int32, copy=False)
        self._move(row, column, backwards)
        numpy.multiply(row, self._columns, out=result, dtype=numpy.int64)
        result += column
        outside = numpy.flatnonzero(result >= self.length)
        if len(outside):
            inside = numpy.empty(len(outside), dtype=numpy.int64)
            self._through(result[outside], inside, backwards)
            result[outside] = inside

    def _move(
        self, row: NDArray[numpy.int32], column: NDArray[numpy.int32], backwards: bool
    ) -> None:
        distance = numpy.empty_like(row)
        for number in reversed(range(ROUNDS)) if backwards else range(ROUNDS):
            moved, mover = (column, row) if number % 2 else (row, column)
            modulus = self._columns if number % 2 else self._rows
            numpy.take(self._moves[number], mover, out=distance, mode="clip")
            if backwards:
                moved -= distance
                numpy.add(moved, modulus, out=distance)
            else:
                moved += distance
                numpy.subtract(moved, modulus, out=distance)
            # Of the two the one in range: as unsigned numbers negative ones are the largest.
            unsigned = moved.view(numpy.uint32)
            numpy.minimum(unsigned, distance.view(numpy.uint32), out=unsigned)
