"""The methods that a strategy may have."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mpiddl.errors import GradientError
from mpiddl.strategies.replica import Replica
from mpiddl.strategies.stats import Stats

__all__ = ["LateStep", "Strategy"]


class LateStep(Protocol):
    """Waits for the buckets in place of the end of backward.

    Attributes:
        optimizer: The optimizer whose steps it does.
    """

    optimizer: torch.optim.Optimizer

    def backward_ended(self) -> None:
        """All buckets are in flight or complete."""
        ...

    def forward_begins(self) -> None:
        """The model is about to be called in training."""
        ...

    def wait_for_gradients(self) -> None:
        """Wait for all buckets: gradients can be read then."""
        ...

    def synchronize(self) -> None:
        """Wait for all buckets, and do what was to be done with them."""
        ...

    def close(self) -> None:
        """``synchronize`` for the last time, and leave the model alone from now on."""
        ...


class Strategy:
    """When and how the replicas of a model are made equal.

    ``DataParallel`` binds one strategy to one model, and every rank binds the same. Each method
    that is called here does nothing; a strategy overrides those that it needs, and together they
    are what happens in a step, from top to bottom.

    Attributes:
        replica: This rank's copy of the model, once ``bind`` was called.
        late_step: Waits for what is exchanged in place of the end of backward; None: nobody does.
    """

    replica: Replica
    late_step: LateStep | None = None

    def bind(self, replica: Replica) -> None:
        """Belong to a model from now on. Collective."""
        self.replica = replica

    def plan_changed(self) -> None:
        """The model has other trained parameters, ``replica.trained``: before the first step, and
        after some were frozen or unfrozen. Collective."""

    def forward_begins(self) -> None:
        """The model is about to be called in training."""

    def backward_begins(self, takes_part: bool) -> None:
        """A backward has its first gradient on this rank, whose gradients weigh
        ``replica.weight``.

        Args:
            takes_part: False where this rank has no samples: no gradient will be ready.
        """

    def gradient_ready(self, member: int) -> None:
        """Autograd has finished the gradient of ``replica.trained[member]``."""

    def backward_ended(self) -> None:
        """All gradients of this backward are there. When this returns, ``backward()`` does."""

    def step_begins(self, optimizer: torch.optim.Optimizer, in_backward: bool) -> None:
        """``optimizer`` is about to step some of the parameters.

        Raises:
            GradientError: It does so in the middle of a backward.
        """
        if in_backward:
            raise GradientError(
                f"{type(optimizer).__name__}.step() was called during backward, by a gradient "
                "hook: the gradients are not reduced yet, and the replicas would drift apart. Step "
                "after backward, or use mpiddl.OverlappedOptimizer, which updates each parameter "
                "as soon as its gradient is reduced"
            )

    def synchronize(self) -> None:
        """Wait until all that steps have left to do is done."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed job must know, as JSON and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what ``state_dict()`` returned in an earlier job. Collective."""

    def count(self) -> Stats:
        """The costs of all that was exchanged so far."""
        return self.replica.accounts.stats

    def close(self) -> None:
        """The model is trained on this rank alone from now on. Collective."""
