"""The state of an optimizer, or a scheduler, from one rank to all: JSON and raw tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import torch

from mpiddl.collectives.channel import bytes_of
from mpiddl.comm.world import World
from mpiddl.overlap.calls import broadcast, broadcast_json
from mpiddl.training.state import gapless

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
    mine = world.rank == root
    text = _encode(holder.state_dict(), tensors, type(holder).__name__) if mine else None
    text = broadcast_json(text, root, world=world)
    state = None if mine else _decode(text, tensors)
    for tensor in tensors:
        broadcast(bytes_of(tensor), root, world=world)
    if not mine:
        holder.load_state_dict(state)  # type: ignore[arg-type]


def _encode(value: Any, tensors: list[torch.Tensor], where: str) -> Any:
    """``value`` as JSON, with tensors described there and appended to ``tensors``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        whole = gapless(value).cpu()  # load_state_dict takes it to where the parameters are
        tensors.append(whole)
        dtype = str(whole.dtype).removeprefix("torch.")
        return {"tensor": [dtype, list(whole.shape), list(whole.stride())]}
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict):  # whose keys may be numbers, which JSON would make strings of
        return {
            "counter" if isinstance(value, Counter) else "dict": [
                [_encode(key, tensors, where), _encode(item, tensors, f"{where}[{key!r}]")]
                for key, item in value.items()
            ]
        }
    raise TypeError(
        f"{where} is a {type(value).__name__}: only tensors, numbers, strings, lists, tuples and "
        "dictionaries can go to other ranks"
    )


def _decode(value: Any, tensors: list[torch.Tensor]) -> Any:
    """What ``_encode`` was given, with empty tensors, which are appended to ``tensors``."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        dtype, shape, strides = content
        empty = torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device="cpu")
        tensors.append(empty)
        return tensors[-1]
    if kind in ("dict", "counter"):  # such as MultiStepLR's milestones
        pairs = {_decode(key, tensors): _decode(item, tensors) for key, item in content}
        return pairs if kind == "dict" else Counter(pairs)
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
