"""Memory for users' tensors that the other ranks of a node can reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mpiddl.collectives.reduction import DTYPES
from mpiddl.comm.world import World, current_world
from mpiddl.devices.host import HOST
from mpiddl.errors import UnsupportedBufferError

__all__ = ["empty"]


def empty(
    shape: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    world: World | None = None,
) -> torch.Tensor:
    """A tensor in memory that the ranks of a node share: the fastest place for an all-reduce.

    Collective: every rank asks for the same shape and dtype. Not initialised. The memory goes when
    the last view of it goes. Where a node has not enough shared memory every rank gets
    private memory, with one warning. Reduce it on the ``world`` that it was made for.

    Raises:
        ValueError: A negative dimension.
        UnsupportedBufferError: A dtype that cannot be reduced.
    """
    world = world or current_world()
    world.check_open()
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"a shape has no negative dimensions, got {sizes}")
    if dtype not in DTYPES:
        raise UnsupportedBufferError(f"{dtype} cannot be reduced; use torch.empty")
    return HOST.empty(math.prod(sizes), dtype, world).view(sizes)
