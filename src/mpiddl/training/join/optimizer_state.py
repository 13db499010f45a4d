"""The state of an optimizer, or a scheduler, from one rank to all: JSON and raw tensors."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mpiddl.api.broadcast import broadcast
from mpiddl.api.objects import broadcast_json
from mpiddl.base.plain import decode, encode, gapless
from mpiddl.collectives.channel import bytes_of
from mpiddl.comm.world import World

__all__ = ["Stateful", "broadcast_plain_state"]


class Stateful(Protocol):
    """An optimizer, a learning rate scheduler, a GradScaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def broadcast_plain_state(holder: Stateful, world: World, root: int) -> None:
    """Load rank ``root``'s ``state_dict()`` on every other rank. Collective; nothing is pickled.

    Raises:
        TypeError: On rank ``root``: it holds something else than tensors and plain values.
    """
    tensors: list[torch.Tensor] = []
    text, shapes = None, None
    if world.rank == root:
        text, tensors = encode(holder.state_dict(), type(holder).__name__)
        # load_state_dict takes them to where the parameters are
        tensors = [gapless(tensor).cpu() for tensor in tensors]
        shapes = [
            (str(whole.dtype).removeprefix("torch."), whole.shape, whole.stride())
            for whole in tensors
        ]
    text, shapes = broadcast_json([text, shapes], root, world=world)
    if world.rank != root:
        tensors = [
            torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device="cpu")
            for dtype, shape, strides in shapes
        ]
    for tensor in tensors:
        broadcast(bytes_of(tensor), root, world=world)
    if world.rank != root:
        holder.load_state_dict(decode(text, tensors))
