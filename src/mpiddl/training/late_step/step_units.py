"""Which parameters are updated together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mpiddl.gradients.in_flight import guard
from mpiddl.strategies.synchronous import Synchronous

__all__ = ["Group", "StepUnits", "clear", "copied"]

Group = dict[str, Any]
"""One of an optimizer's ``param_groups``."""


class StepUnits:
    """Parameters whose gradients are complete with the same bucket are updated together.

    Attributes:
        gradients: The layout that this is for.
        members: The parameters of each unit, by their places in the model.
        parameters: The parameters of each unit.
        buckets: The buckets that the gradients of each unit are in.
        groups: The parameters of each unit, by group of the optimizer.
        others: The parameters of each group that are not exchanged.
        unit_of: The unit of each parameter, by the parameter's identity.
        hidden: The value of each parameter's ``grad`` while it is in flight.
    """

    def __init__(self, strategy: Synchronous, groups: Sequence[Group]) -> None:
        self.gradients = gradients = strategy.gradients
        self.hidden = [guard(view) for view in gradients.views]
        by_bucket: dict[int, list[int]] = {}
        for member in range(len(strategy.parameters)):
            last = max(bucket.number for bucket in gradients.buckets_of(member))
            by_bucket.setdefault(last, []).append(member)
        self.members = [by_bucket[number] for number in sorted(by_bucket)]
        self.parameters = [[strategy.parameters[m] for m in members] for members in self.members]
        self.buckets = [
            list({b.number: b for m in members for b in gradients.buckets_of(m)}.values())
            for members in self.members
        ]
        unit_of = self.unit_of = {
            id(p): unit for unit, parameters in enumerate(self.parameters) for p in parameters
        }
        self.groups = [
            [[p for p in group["params"] if unit_of.get(id(p)) == unit] for group in groups]
            for unit in range(len(self.members))
        ]
        self.others = [[p for p in group["params"] if id(p) not in unit_of] for group in groups]


def copied(group: Group) -> Group:
    """A copy of a group without its parameters."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in group.items()
        if name != "params"
    }


def clear(parameters: Iterable[torch.nn.Parameter], set_to_none: bool) -> None:
    """Zero gradients, or make them None."""
    for parameter in parameters:
        if set_to_none or parameter.grad is None:
            parameter.grad = None
        else:
            if parameter.grad.requires_grad:  # made with create_graph
                parameter.grad = parameter.grad.detach()
            parameter.grad.zero_()
