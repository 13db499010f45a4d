"""An optimizer whose exchange goes on into the next forward."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mpiddl.comm.world import World
from mpiddl.launch.exit import at_clean_exit
from mpiddl.observe.events import Kind, record
from mpiddl.training.data_parallel import DataParallel
from mpiddl.training.late_step.own_hooks import OwnHook
from mpiddl.training.late_step.parameter_use import ParameterUse
from mpiddl.training.late_step.step_units import Group, StepUnits, clear, copied

__all__ = ["OverlappedOptimizer"]

_ABSENT = object()


class OverlappedOptimizer(torch.optim.Optimizer):
    """Any torch optimizer, stepping parameters when they are needed instead of all at once.

        optimizer = mpiddl.OverlappedOptimizer(torch.optim.Adam, model, lr=1e-3)

    ``backward()`` returns while buckets are in flight. ``step()`` updates the parameters whose
    gradients are there; the others follow in the next forward, each module waiting for its own.
    Buckets that the next forward needs first are sent first. The result is the same, bit for bit,
    as that of the plain loop; learning rates count as they are at ``step()``.

    Which module waits for a parameter is learnt in the first forward. A parameter that a later
    forward uses elsewhere, earlier than its module, would be one step old: leave models whose
    forward changes like that to the plain optimizer. Evaluation, ``state_dict()`` and
    ``replicas.check`` wait for everything; before parameters are read in other ways call
    ``synchronize()``. Before gradients are read, such as to clip them or by GradScaler, call
    ``wait_for_gradients()``: a global norm needs all of them.

    Args:
        optimizer_class: Steps parameters independently of each other, as all in ``torch.optim`` but
            LBFGS do.
        model: A ``DataParallel``. The exchange of its gradients is what overlaps.
        params: Parameters or groups, as ``optimizer_class`` takes them; default the model's.
        kwargs: Keyword arguments of ``optimizer_class``.

    Raises:
        TypeError: ``model`` is not a ``DataParallel``.
        ValueError: Its gradients are overlapped already, its strategy is not the default one, or
            LBFGS.

    Source:
        Peng et al., "A generic communication scheduler for distributed DNN training acceleration",
        SOSP 2019 (crossing the barrier between steps).
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        model: DataParallel,
        params: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, DataParallel):
            raise TypeError(f"expected a mpiddl.DataParallel, got {type(model).__name__}")
        if issubclass(optimizer_class, torch.optim.LBFGS):
            raise ValueError("LBFGS looks at all parameters together: they cannot be stepped apart")
        strategy = model.synchronous
        if strategy.late_step is not None:
            raise ValueError("this model has an OverlappedOptimizer already")
        self.optimizer = optimizer_class(model.parameters() if params is None else params, **kwargs)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._strategy = strategy
        self._units = StepUnits(strategy, self.optimizer.param_groups)
        self._pending: dict[int, None] = {}  # units whose buckets nobody has waited for
        self._unstepped: set[int] = set()
        self._due: list[Group] | None = None  # groups as they were at the step that is owed
        self._changes: list[Group] = []  # what the step has made of them
        self._zeroes: bool | None = None  # set_to_none of the zero_grad() that is owed
        self._root = model.module
        self._use = ParameterUse(self._root, self._wait_for)
        strategy.late_step = self
        self._hooks = [
            register(OwnHook(lambda *_: self.synchronize()))  # type: ignore[no-untyped-call]
            for register in (
                self._root.register_state_dict_pre_hook,
                self._root.register_load_state_dict_pre_hook,
            )
        ]
        self._learns = not any(_is_compiled(module) for module in self._root.modules())
        if self._root._compiled_call_impl is None:  # else the hooks would be compiled too
            self._hooks += [
                self._root.register_forward_pre_hook(OwnHook(self._root_begins), prepend=True),
                self._root.register_forward_hook(
                    OwnHook(lambda *_: self._use.end()), always_call=True
                ),
            ]
        self.world = model.world
        self.world.at_close(_finish_all)

    # What the strategy calls.

    def backward_ended(self) -> None:
        """All buckets are in flight or complete; nobody may look at the gradients."""
        if self._units.gradients is not self._strategy.gradients:
            self._units = StepUnits(self._strategy, self.optimizer.param_groups)
        for parameter, hidden in zip(self._strategy.parameters, self._units.hidden, strict=True):
            parameter.grad = hidden
        # What the next forward needs first comes first.
        self._pending = dict.fromkeys(reversed(range(len(self._units.members))))
        self._unstepped = set(self._pending)
        _owing.add(self)
        self._zeroes = None

    def forward_begins(self) -> None:
        """Compiled modules run no hooks, and look at gradients before they do anything else."""
        if not self._learns:
            self.synchronize()

    def close(self) -> None:
        """The model is not exchanged any more."""
        self.synchronize()
        self._strategy.late_step = None
        for hook in (*self._hooks, self._use):
            hook.remove()

    # What users call.

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update parameters, now or in the next forward.

        Raises:
            ValueError: ``closure`` is given: it would need all parameters at once.
        """
        if closure is not None:
            raise ValueError("OverlappedOptimizer.step() takes no closure; use the plain optimizer")
        if self._due is not None:
            self.synchronize()
        for pre_hook in self._optimizer_step_pre_hooks.values():
            pre_hook(self, (), {})
        if self._unstepped:
            groups = self.optimizer.param_groups
            self._due = [copied(group) for group in groups]
            self._changes = [{} for _ in groups]
            self._step_on(self._units.others)
            scheduler = self._strategy.scheduler
            for unit in sorted(self._unstepped, reverse=True):
                if unit not in self._pending:
                    self._step(unit)
                elif scheduler.all_complete(self._units.buckets[unit]):
                    self._finish(unit)
        else:
            self.optimizer.step()
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, (), {})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients: of parameters that are not updated yet, once they are."""
        if not self._unstepped:
            self.optimizer.zero_grad(set_to_none)
            return
        self._zeroes = set_to_none
        # What was waited for and is not to be stepped has nothing to wait for.
        units = self._pending if self._due is None else self._unstepped
        waiting = {id(p) for unit in units for p in self._units.parameters[unit]}
        for group in self.optimizer.param_groups:
            clear((p for p in group["params"] if id(p) not in waiting), set_to_none)

    def wait_for_gradients(self) -> None:
        """Wait until all gradients are reduced; afterwards ``param.grad`` can be used."""
        for unit in list(self._pending):
            self._finish(unit)
        _owing.discard(self)
        self._strategy.wait_for_buffers()

    def synchronize(self) -> None:
        """Wait until all parameters are updated, as far as ``step()`` was called."""
        self.wait_for_gradients()

    def state_dict(self) -> dict[str, Any]:
        """The state of the plain optimizer, which can load it."""
        self.synchronize()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state of this optimizer or of a plain one."""
        self.synchronize()
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the plain optimizer."""
        self.synchronize()
        self.optimizer.add_param_group(param_group)
        self._units = StepUnits(self._strategy, self.optimizer.param_groups)

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The plain optimizer's, for learning rate schedulers."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The plain optimizer's, once everything is updated."""
        self.synchronize()
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The plain optimizer's."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        # What torch.optim.Optimizer's own methods keep, such as hooks of state_dict().
        if name == "optimizer":  # not there yet
            raise AttributeError(name)
        if name.startswith("_"):
            return getattr(self.optimizer, name)
        # What an optimizer offers beyond torch's, such as train() and eval() of schedule-free ones,
        # reads and writes parameters and state: after the steps that are owed.
        value = getattr(self.optimizer, name)
        if not inspect.ismethod(value):
            self.synchronize()
            return getattr(self.optimizer, name)

        @functools.wraps(value)
        def after_the_steps(*args: Any, **kwargs: Any) -> Any:
            self.synchronize()
            return value(*args, **kwargs)

        return after_the_steps

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an OverlappedOptimizer cannot be copied or pickled: it belongs to its model. Keep its "
            "state_dict() instead"
        )

    def __repr__(self) -> str:
        return f"OverlappedOptimizer({self.optimizer!r})"

    # Units.

    def _finish(self, unit: int) -> None:
        """Wait for the gradients of one unit, and update its parameters if that is due."""
        del self._pending[unit]
        strategy, units = self._strategy, self._units
        strategy.wait(units.buckets[unit])
        untouched = set(strategy.unused.untouched)
        for member in units.members[unit]:
            parameter = strategy.parameters[member]
            if parameter.grad is None:  # model.zero_grad()
                self._zeroes = True
            parameter.grad = None if member in untouched else units.gradients.views[member]
        if self._due is not None:
            self._step(unit)
        elif self._zeroes is not None:
            clear(units.parameters[unit], self._zeroes)

    def _step(self, unit: int) -> None:
        self._step_on(self._units.groups[unit])
        last = max(bucket.number for bucket in self._units.buckets[unit])
        record(Kind.STEP, self._strategy.replica.number, last)
        self._unstepped.discard(unit)
        if self._zeroes is not None:
            clear(self._units.parameters[unit], self._zeroes)
        if not self._unstepped:
            for group, changes in zip(self.optimizer.param_groups, self._changes, strict=True):
                group.update(changes)
            self._due = self._zeroes = None

    def _step_on(self, parameters: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        """Update these parameters of each group, with what the group said at ``step()``."""
        assert self._due is not None
        stepped = [
            {**group, "params": list(p)} for group, p in zip(self._due, parameters, strict=True)
        ]
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [group for group in stepped if group["params"]]
        try:
            if self.optimizer.param_groups:
                self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        for group, before, changes in zip(stepped, self._due, self._changes, strict=True):
            del group["params"]
            changes.update({k: v for k, v in group.items() if v is not before.get(k, _ABSENT)})

    # What forwards wait for.

    def _root_begins(self, root: torch.nn.Module, _args: object) -> None:
        self._strategy.wait_for_buffers()
        trains = root.training and torch.is_grad_enabled()
        if not trains or not self._use.learnt:  # evaluation takes short cuts past modules
            self.synchronize()
        if trains and self._learns:
            self._use.begin()

    def _wait_for(self, parameters: Sequence[torch.Tensor]) -> None:
        """Wait until parameters that a forward is about to use are updated."""
        if not self._pending:
            return
        for parameter in parameters:
            unit = self._units.unit_of.get(id(parameter))
            if unit is not None and unit in self._pending:
                self._finish(unit)
        self._strategy.engine.nudge()


_owing: set[OverlappedOptimizer] = set()
"""Those with buckets in flight, which other ranks wait for whatever becomes of them here."""


def _finish_all(world: World | None = None) -> None:
    for optimizer in list(_owing):
        if world is None or optimizer.world is world:
            optimizer.synchronize()


at_clean_exit(_finish_all)


def _is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
