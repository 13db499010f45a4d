"""Compares a model with the one that was wrapped."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch

from mpiddl.errors import GradientError

__all__ = ["ModelGuard"]


class ModelGuard:
    """The parameters of a model as they were, to compare with whenever it is trained.

    Works on the modules' own dictionaries: ``named_parameters()`` takes ten times as long.

    Args:
        module: The model as it is now.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        modules = list(module.modules())
        self._tables = [m._parameters for m in modules]
        self._child_tables = [m._modules for m in modules]
        self._parameters = list(self._now())
        self._children = list(self._children_now())
        self._dtypes = [p.dtype for p in self._parameters]
        self._devices = [p.device for p in self._parameters]
        self._trained = [p.requires_grad for p in self._parameters]
        self._names = {id(p): name for name, p in module.named_parameters()}

    def _now(self) -> Iterator[torch.nn.Parameter]:
        return (p for table in self._tables for p in table.values() if p is not None)

    def _children_now(self) -> Iterator[torch.nn.Module]:
        return (m for table in self._child_tables for m in table.values() if m is not None)

    def changed(self) -> bool:
        """Whether parameters were frozen or unfrozen, in a model that has the same ones still.

        Raises:
            GradientError: The model has other parameters, or has them elsewhere.
        """
        now = list(self._now())
        same = (
            len(now) == len(self._parameters)
            and all(map(operator.is_, now, self._parameters))
            and [p.dtype for p in now] == self._dtypes
            and [p.device for p in now] == self._devices
            and all(map(operator.is_, self._children_now(), self._children))
        )
        if not same:
            self._refuse()
        return self.retrained()

    def retrained(self) -> bool:
        """Whether parameters were frozen or unfrozen, and some are trained now.

        While all are frozen, as a discriminator is during its generator's step, no gradient can
        come, and most often the same ones are trained again afterwards.
        """
        trained = [p.requires_grad for p in self._parameters]
        return trained != self._trained and any(trained)

    @property
    def rests(self) -> bool:
        """Whether all parameters are frozen at the moment."""
        return not any(p.requires_grad for p in self._parameters)

    def _refuse(self) -> None:
        places = zip(self._dtypes, self._devices, strict=True)
        before = dict(zip(map(id, self._parameters), places, strict=True))
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in before:
                raise GradientError(
                    f"parameter {name!r} was not there when the model was wrapped (new, or "
                    "replaced by load_state_dict(assign=True) or the like): its gradient would "
                    "stay on this rank. Change the model before wrapping it, or unwrap() and wrap "
                    "again; and make the optimizer afterwards"
                )
            dtype, device = before[id(parameter)]
            if (parameter.dtype, parameter.device) != (dtype, device):
                raise GradientError(
                    f"parameter {name!r} was {dtype} on {device} when the model was wrapped and is "
                    f"{parameter.dtype} on {parameter.device} now: call .to() before wrapping"
                )
        gone = set(before) - {id(parameter) for parameter in self._module.parameters()}
        names = sorted(self._names[which] for which in gone)
        if names:
            raise GradientError(
                f"parameter {names[0]!r} was there when the model was wrapped and is not now: "
                "unwrap() and wrap again"
            )
        self.__init__(self._module)  # type: ignore[misc] # modules moved, parameters did not
