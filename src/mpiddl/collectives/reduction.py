"""What an all-reduce computes: an operation, and each rank's weight in a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpiddl.base.waits import Waits
from mpiddl.devices.base import Buffer, Device
from mpiddl.errors import UnsupportedBufferError

__all__ = ["DTYPES", "OPS", "Reduction", "check_scales", "reduction_of", "scaled"]

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


def reduction_of(
    op: str, dtype: torch.dtype, size: int, pre_scale: float | None = None
) -> Reduction:
    """The reduction that a user's ``op`` stands for; in sums ``pre_scale`` is part of the weight.

    Raises:
        ValueError: Unknown ``op``.
        UnsupportedBufferError: A mean of integers.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; valid are {', '.join(OPS)}")
    if op != "mean":
        return Reduction(op, pre_scale if op == "sum" else None)
    if dtype not in FLOATS:
        raise UnsupportedBufferError(
            f"the mean of {dtype} is not an integer; use op='sum', or convert to a float dtype"
        )
    if pre_scale is not None:
        return Reduction("sum", pre_scale / size)
    return Reduction("sum", 1 / size if size > 1 else None)


def check_scales(dtype: torch.dtype, *scales: float | None) -> None:
    """Refuse to scale integers.

    Raises:
        UnsupportedBufferError: ``dtype`` is not a float dtype and a scale is given.
    """
    if dtype not in FLOATS and any(scale is not None for scale in scales):
        raise UnsupportedBufferError(
            f"{dtype} cannot be scaled; leave pre_scale and post_scale out, or convert to a float "
            "dtype"
        )


def scaled(
    waits: Waits[None],
    buffer: Buffer,
    pre_scale: float | None,
    post_scale: float | None,
    device: Device,
) -> Waits[None]:
    """The reduction ``waits`` of ``buffer``, which is multiplied before and after it."""
    if pre_scale is not None:
        device.scale(buffer, pre_scale)
    yield from waits
    if post_scale is not None:
        device.scale(buffer, post_scale)
