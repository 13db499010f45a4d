"""Who may wait for the buckets in place of the end of backward."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Deferral"]


class Deferral(Protocol):
    """Takes over the wait for buckets.

    Attributes:
        optimizer: Whose steps it does.
    """

    optimizer: torch.optim.Optimizer

    def backward_ended(self) -> None:
        """All buckets are in flight or complete."""
        ...

    def forward_begins(self) -> None:
        """The wrapped model is about to be called in training."""
        ...

    def close(self) -> None:
        """``synchronize`` for the last time, and leave the model alone from now on."""
        ...

    def wait_for_gradients(self) -> None:
        """Wait for all of them: gradients can be read then."""
        ...

    def synchronize(self) -> None:
        """Wait for all of them, and do what was to be done with them."""
        ...
