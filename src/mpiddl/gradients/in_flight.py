"""The value of ``param.grad`` while it is being reduced."""

from __future__ import annotations

from typing import Any

import torch

from mpiddl.errors import GradientError

__all__ = ["InFlight", "guard", "two_backwards"]


class InFlight(torch.Tensor):
    """Refuses to be looked at: other ranks are adding to it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise GradientError(
            "a gradient was used while it is being reduced: with OverlappedOptimizer gradients are "
            "in flight until the next forward. Call optimizer.wait_for_gradients() first (to clip "
            "them, for GradScaler, or to print them), which gives up the overlap of this step; "
            "or, where it is torch.compile that looks, compile the model before it is wrapped"
        )


def guard(gradient: torch.Tensor) -> InFlight:
    """``gradient``'s memory under a name that cannot be used."""
    return gradient.as_subclass(InFlight)


def two_backwards() -> GradientError:
    """The error for a gradient in flight to which autograd has added."""
    return GradientError(
        "two backwards after one another, while gradients of the first are in flight: call "
        "optimizer.wait_for_gradients() between them"
    )
