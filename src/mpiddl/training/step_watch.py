"""Optimizers that are about to step gradients which no rank has reduced are found at their step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpiddl.training.wrapping import wrapper_of

__all__ = ["Watcher", "watch_steps"]


class Watcher(Protocol):
    """A wrapper whose parameters are stepped."""

    def step_begins(self, optimizer: torch.optim.Optimizer, in_backward: bool) -> None:
        """``optimizer`` has some of its parameters. Raises an error, or says what is wrong."""


@functools.cache
def watch_steps() -> None:
    """From now on wrappers hear of every step of every torch optimizer in this process."""
    register_optimizer_step_pre_hook(_step_begins)


def _step_begins(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return  # a step that is compiled: what it is called from is not seen here
    in_backward = torch._C._current_graph_task_id() != -1
    for watcher in _watchers(optimizer, every_parameter=in_backward):
        watcher.step_begins(optimizer, in_backward)


def _watchers(optimizer: torch.optim.Optimizer, every_parameter: bool) -> Iterator[Watcher]:
    """The wrappers of its parameters, or of the first in each group alone, which costs nothing."""
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"] if every_parameter else group["params"][:1]:
            wrapper = wrapper_of(parameter)
            if wrapper is not None and id(wrapper) not in seen:
                seen.add(id(wrapper))
                yield wrapper
