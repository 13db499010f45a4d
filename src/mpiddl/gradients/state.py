"""A model's parameters and buffers, and which of them ranks can exchange."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

__all__ = ["NotPlain", "named_state", "why_not_plain"]


def named_state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a model under their names, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


class NotPlain(NamedTuple):
    """Why a tensor has no memory that ranks can exchange, and what to do about it."""

    problem: str
    way_out: str


def why_not_plain(tensor: torch.Tensor) -> NotPlain | None:
    """The kind of a tensor that has no plain memory to exchange; None if it has."""
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
