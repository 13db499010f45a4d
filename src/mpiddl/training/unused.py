"""Parameters that get no gradient in a backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mpiddl.errors import GradientError
from mpiddl.overlap.control import Control

__all__ = ["Unused"]


class Unused:
    """Which parameters took no part, on this rank and anywhere.

    A parameter that some ranks used gets their mean, to which the others contribute zeros. One
    that no rank used keeps its ``grad`` as it was, most often None, so that the optimizer passes
    it by: its momentum and weight decay rest too.

    Args:
        parameters: In the model's order.
        names: Theirs.
        static: The same ones take no part in every backward: find out once.

    Attributes:
        here: No gradient on this rank, as far as is known when a backward begins.
        untouched: No gradient on any rank in the last backward, and none from before.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], names: Sequence[str], static: bool
    ) -> None:
        self._parameters = parameters
        self._names = names
        self._static = static
        self.known = False
        self.here: frozenset[int] = frozenset()
        self.untouched: list[int] = []
        self._nowhere: frozenset[int] = frozenset()

    def begin(self) -> None:
        """A backward starts."""
        self._note_untouched() if self.known else None

    def settle(self, absent: Sequence[int], control: Control) -> None:
        """``absent`` got no gradient on this rank. Collective, unless that is known already."""
        used = torch.ones(len(self._parameters), dtype=torch.uint8)
        used[list(absent)] = 0
        control.largest(used)
        self._nowhere = frozenset(torch.nonzero(used == 0).flatten().tolist())
        self._note_untouched()
        if self._static:
            self.here, self.known = frozenset(absent), True

    def _note_untouched(self) -> None:
        self.untouched = [m for m in sorted(self._nowhere) if self._parameters[m].grad is None]

    def refuse(self, members: Iterable[int]) -> None:
        """Raise GradientError if one of ``members``, which have a gradient, was unused before."""
        changed = [self._names[member] for member in members if member in self.here]
        if changed:
            raise GradientError(
                f"parameter {changed[0]!r} got a gradient, but none in the first backward: with "
                "static_graph=True the same parameters must take part in every step. Pass "
                "find_unused_parameters=True instead"
            )

    def restore(self) -> None:
        """What no rank used has no gradient."""
        for member in self.untouched:
            self._parameters[member].grad = None
