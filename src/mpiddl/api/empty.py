"""Memory for users' tensors that the other ranks of a node can reach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from mpiddl.base.units import integer
from mpiddl.collectives.reduction import DTYPES
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_at
from mpiddl.errors import UnsupportedBufferError

__all__ = ["empty"]


def empty(
    shape: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device | None = None,
    world: World | None = None,
) -> torch.Tensor:
    """A tensor in memory that the ranks of a node share: the fastest place for an all-reduce.

    Collective: every rank asks for the same shape and dtype, on the same kind of device. Not
    initialised. The memory goes when the last view of it goes; a GPU's when the next one is made
    after that. Where a node has not enough shared memory, or its ranks cannot map each
    other's GPU memory, every rank gets private memory, with one warning. Reduce it on the
    ``world`` that it was made for.

    Args:
        shape: The tensor's shape.
        dtype: One that can be reduced.
        device: The CPU or a GPU; default ``world.device``.
        world: The ranks; default those of ``mpiddl.init()``.

    Raises:
        ValueError: A negative dimension.
        UnsupportedBufferError: A dtype that cannot be reduced, or an unknown kind of device.
        GpuMemoryError: On every rank, if one GPU has not so much memory.
    """
    world = world or current_world()
    world.check_open()
    sizes = tuple(
        integer(size, "shape") for size in (shape if isinstance(shape, Iterable) else (shape,))
    )
    if any(size < 0 for size in sizes):
        raise ValueError(f"a shape has no negative dimensions, got {sizes}")
    if dtype not in DTYPES:
        raise UnsupportedBufferError(f"{dtype} cannot be reduced; use torch.empty")
    place = world.device if device is None else torch.device(device)
    return device_at(place).empty(math.prod(sizes), dtype, world).view(sizes)
