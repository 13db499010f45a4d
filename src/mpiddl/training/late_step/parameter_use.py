"""Which parameters the forward of a module needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from mpiddl.training.late_step.first_use import first_uses
from mpiddl.training.late_step.own_hooks import OwnHook

__all__ = ["Needs"]


class Needs:
    """Learns in one forward which module uses a parameter first; from then on waits ahead of it.

    Args:
        root: The model, whose own hooks call ``begin`` and ``end``.
        wait: Called with the parameters that a module's forward is about to use.

    Attributes:
        learnt: Whether that forward has been.
    """

    def __init__(
        self, root: torch.nn.Module, wait: Callable[[Sequence[torch.Tensor]], None]
    ) -> None:
        self._root = root
        self._wait = wait
        self._of: dict[torch.nn.Module, list[torch.Tensor]] = {}
        self._learning: ExitStack | None = None
        self._found: dict[int, torch.nn.Module] = {}
        self._hooks: list[Any] = []

    @property
    def learnt(self) -> bool:
        return bool(self._of)

    def begin(self) -> None:
        """A forward of the root begins."""
        if self.learnt:
            self._wait(self._of[self._root])
        else:
            self._learning = ExitStack()
            self._found = self._learning.enter_context(first_uses(self._root))

    def end(self) -> None:
        """It is over, whether it raised or not."""
        if self._learning is None:
            return
        self._learning.close()
        self._learning = None
        self._of = {self._root: []}
        for parameter in self._root.parameters():
            self._of.setdefault(self._found.get(id(parameter), self._root), []).append(parameter)
        hook = OwnHook(lambda module, _args: self._wait(self._of[module]))
        self._hooks = [
            module.register_forward_pre_hook(hook)
            for module in self._of
            if module is not self._root
        ]

    def remove(self) -> None:
        """Wait for nothing any more."""
        for hook in self._hooks:
            hook.remove()
