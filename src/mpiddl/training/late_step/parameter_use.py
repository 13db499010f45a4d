"""Which module's forward uses a parameter first, and a wait ahead of that use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mpiddl.training.late_step.own_hooks import OwnHook

__all__ = ["ParameterUse"]


class ParameterUse:
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
            self._found = self._learning.enter_context(_first_uses(self._root))

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


class _Watch(TorchFunctionMode):
    """Sees every torch function that is called with a parameter."""

    def __init__(self, parameters: Iterable[torch.Tensor], stack: list[torch.nn.Module]) -> None:
        self._wanted = set(map(id, parameters))
        self._stack = stack
        self.found: dict[int, torch.nn.Module] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            if id(tensor) in self._wanted:
                self._wanted.discard(id(tensor))
                self.found[id(tensor)] = self._stack[-1]
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def _first_uses(root: torch.nn.Module) -> Iterator[dict[int, torch.nn.Module]]:
    """Watch one forward of ``root``.

    Yields:
        A dictionary that fills: by the identity of a parameter, the innermost module whose forward
        ran when it was used first. That is not always the module that owns it: attention uses its
        output projection's weight without calling it.
    """
    stack = [root]

    def push(module: torch.nn.Module, _args: object) -> None:
        stack.append(module)

    def pop(_module: torch.nn.Module, _args: object, _output: object) -> None:
        stack.pop()

    handles = []
    for module in root.modules():
        if module is not root:
            handles += [
                module.register_forward_pre_hook(push),
                module.register_forward_hook(pop, always_call=True),
            ]
    try:
        with _Watch(root.parameters(), stack) as watch:
            yield watch.found
    finally:
        for handle in handles:
            handle.remove()
