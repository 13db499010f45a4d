"""Values whose collectives are known without communication, exact in every dtype.

Element i of rank r's buffer is a small whole number that depends on i + r, so a result is known
from its place alone, and a segment that went to the wrong place is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpiddl.base.segments import split

__all__ = ["COLLECTIVES", "count_wrong", "fill", "lengths"]

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "broadcast", "all-to-all")
TILE = 1 << 16
"""Elements that are worked on at a time: in a core's cache."""
GPU_TILE = 1 << 22
"""A GPU has no use for small pieces; of this one, some 200 MB of numbers are made."""
LARGEST_EXACT = 127  # int8

Values = Callable[[torch.Tensor], torch.Tensor]
"""Element numbers -> what is there."""


def lengths(collective: str, length: int, size: int) -> tuple[int, int]:
    """Elements of the input and of the output of a collective of ``length`` elements in all."""
    part = length // size
    if collective == "all-gather":
        return part, part * size
    if collective == "reduce-scatter":
        return part * size, part
    return (part * size,) * 2 if collective == "all-to-all" else (length, length)


def fill(buffer: torch.Tensor, rank: int, size: int, op: str) -> None:
    """Write rank ``rank``'s values."""
    for first, part in _tiles(buffer):
        part.copy_(_values(rank, size, op)(_places(first, part)))


def count_wrong(
    output: torch.Tensor, collective: str, rank: int, size: int, op: str, root: int = 0
) -> int:
    """Elements of rank ``rank``'s output that are not what they must be."""
    if collective == "all-reduce":
        return _differing(output, 0, _reduced(size, op))
    if collective == "reduce-scatter":
        return _differing(output, rank * len(output), _reduced(size, op))
    if collective == "broadcast":
        return _differing(output, 0, _values(root, size, op))
    part = len(output) // size
    start = 0 if collective == "all-gather" else rank * part
    return sum(
        _differing(output[segment], start, _values(peer, size, op))
        for peer, segment in enumerate(split(len(output), size))
    )


def _values(rank: int, size: int, op: str) -> Values:
    if op == "prod":
        return lambda index: 1 + ((index + rank) % (2 * size + 1) == 0).long()
    # Odd, since segments are mostly a power of two long and may not look alike; no divisor of the
    # number of ranks, or sums would be the same everywhere.
    fitting = (m for m in (5, 3, 7) if size % m and (m - 1) * size <= LARGEST_EXACT)
    modulus = next(fitting, 2)
    return lambda index: (index + rank) % modulus


def _reduced(size: int, op: str) -> Values:
    folds = {"min": torch.minimum, "max": torch.maximum, "prod": torch.mul}

    def reduced(index: torch.Tensor) -> torch.Tensor:
        total = _values(0, size, op)(index)
        for rank in range(1, size):
            total = folds.get(op, torch.add)(total, _values(rank, size, op)(index))
        return total / size if op == "mean" else total

    return reduced


def _differing(output: torch.Tensor, start: int, values: Values) -> int:
    tolerance = 1e-2 if output.dtype.itemsize == 2 else 1e-5  # for means
    wrong = 0
    for first, part in _tiles(output):
        want = values(_places(start + first, part)).double()
        close = torch.isclose(part.double(), want, rtol=tolerance, atol=0)
        wrong += len(part) - int(close.sum())
    return wrong


def _places(first: int, part: torch.Tensor) -> torch.Tensor:
    """The elements' numbers, where the elements are."""
    return torch.arange(first, first + len(part), device=part.device)


def _tiles(buffer: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    tile = TILE if buffer.is_cpu else GPU_TILE
    return [(first, buffer[first : first + tile]) for first in range(0, len(buffer), tile)]
