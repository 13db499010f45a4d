"""A model's parameters and buffers, and how they become equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mpiddl.base.plain import gapless, overwrite
from mpiddl.collectives.broadcast import broadcast
from mpiddl.collectives.channel import Channel, bytes_of
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.comm.world import World
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import engine_of

__all__ = ["NotPlain", "broadcast_state", "named_state", "why_not_plain"]


def named_state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a model under their names, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


class NotPlain(NamedTuple):
    """Why a tensor has no memory that ranks can exchange, and what to do about it."""

    problem: str
    way_out: str


def why_not_plain(tensor: torch.Tensor) -> NotPlain | None:
    """What ``tensor`` is that has no plain memory to exchange; None if it has."""
    apart = (
        "keep it as a plain attribute of its module, or register its parts (indices and values, "
        "say) as dense buffers"
    )
    if tensor.layout is not torch.strided or tensor.is_sparse:
        return NotPlain(f"a sparse tensor ({tensor.layout})", apart)
    if torch.nn.parameter.is_lazy(tensor):
        return NotPlain("without a shape yet", "run one forward before wrapping")
    if tensor.is_meta:
        return NotPlain(
            "on the meta device",
            "give the model memory, model.to_empty(device=world.device), and initial values",
        )
    if tensor.is_quantized or tensor.is_nested:
        return NotPlain("a quantized tensor" if tensor.is_quantized else "a nested tensor", apart)
    return None


def broadcast_state(model: torch.nn.Module, world: World, root: int = 0) -> None:
    """Rank ``root``'s parameters and buffers on every rank. Collective; all in flight at once."""
    engine = engine_of(world)
    copies = [(tensor.detach(), gapless(tensor)) for _, tensor in named_state(model)]
    works = []
    for _, copy in copies:
        channel = Channel(world, world.tags.foreground())
        device = device_of(copy)
        waits = broadcast(bytes_of(copy), root, channel, chunk_bytes_for(device, world))
        works.append(engine.submit(waits, world, device=device))
    for work, (tensor, copy) in zip(works, copies, strict=True):
        work.wait()
        if copy.data_ptr() != tensor.data_ptr():
            overwrite(tensor, copy)
