"""What an all-reduce computes: an operation, and each rank's weight in a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpiddl.errors import UnsupportedBufferError

__all__ = ["DTYPES", "OPS", "Reduction", "reduction_of"]

OPS = ("sum", "mean", "min", "max", "prod")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Reduction:
    """``sum``, ``min``, ``max`` or ``prod`` over ranks.

    ``weight`` is what this rank's buffer is multiplied by in a sum, on its way through the
    reduction, so that no extra pass over the buffer is needed; None means 1. A mean is a sum
    in which every rank weighs 1/size.
    """

    op: str
    weight: float | None = None


def reduction_of(op: str, dtype: torch.dtype, size: int) -> Reduction:
    """The reduction that a user's ``op`` stands for.

    Raises:
        ValueError: Unknown ``op``.
        UnsupportedBufferError: A mean of integers.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; valid are {', '.join(OPS)}")
    if op != "mean":
        return Reduction(op)
    if dtype not in FLOATS:
        raise UnsupportedBufferError(
            f"the mean of {dtype} is not an integer; use op='sum', or convert to a float dtype"
        )
    return Reduction("sum", 1 / size if size > 1 else None)
