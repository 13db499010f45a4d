"""Gradients that are not finite, found before they spread to all ranks."""

from __future__ import annotations

import torch

from mpiddl.base.log import logger
from mpiddl.comm.world import World
from mpiddl.errors import GradientError

__all__ = ["check_finite"]


def check_finite(policy: str, name: str, gradient: torch.Tensor, world: World) -> None:
    """Look for NaN and infinity in a gradient of this rank.

    Args:
        policy: ``"warn"`` or ``"error"``.
        name: Name of the parameter.
        gradient: Its gradient before it is reduced.
        world: The ranks, of which the message names this one.

    Raises:
        GradientError: With ``"error"``.
    """
    values = gradient.detach()
    values = values.coalesce().values() if values.is_sparse else values
    # One pass and no mask: a sum is finite unless an element is not, or it overflows.
    if torch.isfinite(values.sum(dtype=torch.float64)):
        return
    kind = "NaN" if torch.isnan(values).any() else "an infinity"
    message = f"rank {world.rank} on {world.hostname}: the gradient of {name!r} holds {kind}"
    if policy == "error":
        raise GradientError(f"{message}. (nan_check='error')")
    logger.warning("%s, which spreads to all ranks", message)
