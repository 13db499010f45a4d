"""Which module's forward uses a parameter first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["first_uses"]


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
def first_uses(root: torch.nn.Module) -> Iterator[dict[int, torch.nn.Module]]:
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
