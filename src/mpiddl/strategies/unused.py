"""Parameters that get no gradient in a backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpiddl.engine.control import Control
from mpiddl.errors import GradientError

__all__ = ["Unused"]


class Unused:
    """Which parameters took no part, on this rank and anywhere.

    A parameter that some ranks used gets their mean, to which the others contribute zeros. One
    that no rank used keeps its ``grad`` as it was, most often None, so that the optimizer passes
    it by: its momentum and weight decay rest too.

    Args:
        parameters: The parameters with dense gradients, in the model's order.
        names: Names of these parameters.
        static: The same parameters take no part in every backward, so they are found out once.

    Attributes:
        here: The parameters without a gradient on this rank, as far as that is known when a
            backward begins.
        untouched: No gradient on any rank in the last backward, and none from before.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], names: Sequence[str], static: bool
    ) -> None:
        self._parameters = parameters
        self._names = names
        self._static = static
        self._known = False  # on every rank, what no rank used
        self.here: frozenset[int] | None = None
        self.untouched: list[int] = []
        self._nowhere: frozenset[int] = frozenset()
        self._empty: set[int] = set()  # had no gradient from before, apart from those that get one

    def begin(self) -> None:
        """A backward starts."""
        self._empty = {m for m, p in enumerate(self._parameters) if p.grad is None}
        self.untouched = []
        if self._known:
            self._note_untouched()

    def settle(self, absent: Sequence[int] | None, control: Control) -> None:
        """End a backward. Collective, unless all is known already.

        Args:
            absent: Parameters that got no gradient on this rank; None: it took no part at all.
            control: Carries the agreement.
        """
        if not self._known:
            count = len(self._parameters)
            said = torch.ones(count + 1, dtype=torch.uint8, device="cpu")
            if absent is not None:
                said[count] = 0  # else: what this rank will use is not known yet
            absent_here = range(count) if absent is None else {*absent, *(self.here or ())}
            said[[m for m in absent_here if m in self._empty]] = 0
            control.largest(said)
            self._nowhere = frozenset(torch.nonzero(said[:count] == 0).flatten().tolist())
            self._note_untouched()
            self._known = self._static and not said[count]
        if self._static and absent is not None and self.here is None:
            self.here = frozenset(absent)

    def _note_untouched(self) -> None:
        self.untouched = sorted(self._nowhere & self._empty)

    def refuse(self, member: int) -> None:
        """Raise GradientError if ``member``, which has a gradient, had none in the first backward
        of a static graph."""
        if self.here is not None and member in self.here:
            raise GradientError(
                f"parameter {self._names[member]!r} got a gradient, but none in the first "
                "backward: with static_graph=True the same parameters must take part in every "
                "step. Pass find_unused_parameters=True instead"
            )

    def restore(self) -> None:
        """Take the gradient from parameters that no rank used."""
        for member in self.untouched:
            self._parameters[member].grad = None
