"""The oracle: gather on rank 0, combine in rank order, hand out. Short, slow, obviously right."""

from __future__ import annotations

import torch

from mpiddl.base.waits import AllOf, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device

__all__ = ["reference_all_reduce"]


def reference_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place; 16-bit floats are rounded once, at the end.

    Needs ``size`` copies of the buffer on rank 0. ``chunk_bytes`` is not used.
    """
    narrow = buffer.dtype.itemsize == 2 and buffer.is_floating_point()
    dtype = torch.float32 if narrow else buffer.dtype
    copies = channel.size if channel.rank == 0 else 1
    with device.scratch(copies * len(buffer), dtype) as scratch:
        mine, *others = scratch.view(copies, len(buffer))
        device.copy(mine, buffer)
        if reduction.weight is not None:
            device.scale(mine, reduction.weight)
        yield device.fence()
        if channel.rank != 0:
            yield channel.send(mine, 0)
            yield channel.receive(buffer, 0)
            return
        yield AllOf(channel.receive(other, peer) for peer, other in enumerate(others, start=1))
        for other in others:
            device.fold(reduction.op, mine, other, None)
        device.copy(buffer, mine)
        yield device.fence()
        yield AllOf(channel.send(buffer, peer) for peer in range(1, channel.size))
