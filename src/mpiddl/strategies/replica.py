"""One rank's copy of a model: a strategy hears of each of its gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from mpiddl.base.plain import gapless, overwrite
from mpiddl.collectives.broadcast import broadcast
from mpiddl.collectives.channel import MessageChannel, bytes_of
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.comm.world import World
from mpiddl.devices.registry import device_of
from mpiddl.engine.control import Control
from mpiddl.engine.engine import engine_of
from mpiddl.errors import GradientError
from mpiddl.gradients.finite import check_finite
from mpiddl.gradients.hooks import (
    attach,
    detach,
    trained_parameters,
    watch_steps,
    watched_parameters,
)
from mpiddl.gradients.in_flight import InFlight, two_backwards
from mpiddl.gradients.model_guard import ModelGuard
from mpiddl.gradients.state import named_state
from mpiddl.observe.events import new_model
from mpiddl.strategies.sparse import sparse_weights
from mpiddl.strategies.stats import Accounts
from mpiddl.strategies.weights import attendance_of, refuse_left_out

__all__ = ["Replica", "broadcast_state"]

_number_of_backward = torch._C._current_graph_task_id


class _Listener(Protocol):
    """The methods of a ``Strategy`` that are called here."""

    def bind(self, replica: Replica) -> None: ...
    def plan_changed(self) -> None: ...
    def forward_begins(self) -> None: ...
    def backward_begins(self, takes_part: bool) -> None: ...
    def gradient_ready(self, member: int) -> None: ...
    def backward_ended(self) -> None: ...
    def step_begins(self, optimizer: torch.optim.Optimizer, in_backward: bool) -> None: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class Replica:
    """Hooks in a model's parameters, and the backward that they belong to.

    Args:
        module: The model.
        world: The ranks that have a copy of it.
        strategy: Hears of the gradients. It keeps this object alive, not the other way round: when
            the wrapper of a model is dropped, its hooks must know.
        nan_check: ``"off"``, ``"warn"`` or ``"error"`` where a gradient is not finite.

    Attributes:
        number: This model among those of the process, in events.
        trained: Names and parameters that are trained, in the model's order: those with dense
            gradients, then those with sparse ones.
        num_dense: Number of parameters with dense gradients.
        samples: Samples of this rank, inside ``batch()``; else None.
        total: Samples of all ranks, inside ``batch()``; None: ``join()`` tells.
        weight: This rank's weight in the sum of the gradients of the backward that runs.
        synchronises: Whether the strategy hears of gradients; not inside ``no_sync()``.
        control: Carries small agreements between the ranks.
        accounts: The costs of what the strategy does.
        backwards: Number of backwards whose gradients the strategy heard of.
    """

    def __init__(
        self, module: torch.nn.Module, world: World, strategy: _Listener, nan_check: str
    ) -> None:
        watch_steps()
        self.number = new_model()
        self.module = module
        self.world = world
        self._strategy = weakref.ref(strategy)
        self.samples: int | None = None
        self.total: int | None = None
        self.weight = 1 / world.size
        self.synchronises = True
        self.accounts = Accounts()
        self.backwards = 0
        self.trained: Sequence[tuple[str, torch.nn.Parameter]] = []
        self.num_dense = 0
        self._nan_check = nan_check
        self._hooked: Sequence[tuple[str, torch.nn.Parameter]] = []  # trained, then frozen ones
        self._unreduced = False  # no_sync has left gradients here
        self._compared = False  # the model, in a forward since the last backward
        self._forwards = 0  # since the last backward
        self._backward: int | None = None  # autograd's number for the one that runs
        self.control = Control(world)
        strategy.bind(self)
        self._hook()

    @property
    def strategy(self) -> _Listener:
        """The strategy that this replica is bound to."""
        strategy = self._strategy()
        assert strategy is not None, "whoever has a replica has its strategy"
        return strategy

    def _hook(self) -> None:
        """Hear of the parameters that are trained now. Collective."""
        named = trained_parameters(self.module, self)
        self._guard = ModelGuard(self.module)
        detach(self, [parameter for _, parameter in self._hooked])
        others = sparse_weights(self.module)
        dense = [(name, parameter) for name, parameter in named if id(parameter) not in others]
        sparse = [(name, parameter) for name, parameter in named if id(parameter) in others]
        self.trained, self.num_dense = [*dense, *sparse], len(dense)
        self.strategy.plan_changed()
        self._hooked = [*self.trained, *watched_parameters(self.module, self)]
        names, parameters = zip(*self._hooked, strict=True)
        attach(self, names, parameters, len(named))

    def _keep_up(self, changed: bool) -> None:
        """Tell the strategy if parameters were frozen or unfrozen; collective then.

        Raises:
            GradientError: Inside ``join()``, where ranks that have left cannot follow.
        """
        if not changed:
            return
        if not attendance_of(self.world).complete:
            raise GradientError(
                "parameters were frozen or unfrozen inside mpiddl.join(), where ranks that have "
                "left the block could not follow. Do that outside of the block, on every rank"
            )
        self.strategy.synchronize()
        self._hook()

    # A step, from top to bottom.

    def forward_begins(self) -> None:
        """A forward that is trained; collective if parameters were frozen or unfrozen before it."""
        self.strategy.forward_begins()
        self._keep_up(self._guard.changed())
        self._compared = True
        self._forwards += 1

    def gradient_ready(self, member: int, parameter: torch.nn.Parameter) -> None:
        """The hook of parameter ``member`` calls this when autograd has finished its gradient."""
        if not self.synchronises:
            self._unreduced, self._forwards = True, 0
            return
        gradient = parameter.grad
        if gradient is None:
            raise GradientError(
                f"the gradient of {self._hooked[member][0]!r} was set to None during backward, by "
                "a hook that ran before it could be reduced: gradients belong to the exchange "
                "until backward is over. An optimizer steps after backward (OverlappedOptimizer "
                "steps each parameter as soon as it can)"
            )
        if type(gradient) is InFlight:
            raise two_backwards()
        backward = _number_of_backward()
        if backward != self._backward:
            member = self._backward_begins(member)
            self._backward = backward
            # Autograd calls back once, after all gradients of this backward.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if gradient.is_sparse is (member < self.num_dense) or self._nan_check != "off":
            self._look_at(member, gradient)
        if member >= len(self.trained):
            raise GradientError(
                f"parameter {self._hooked[member][0]!r} was unfrozen in the middle of a backward: "
                "its gradient would stay on this rank. Unfreeze parameters before backward"
            )
        self.strategy.gradient_ready(member)

    def _backward_begins(self, member: int) -> int:
        """Parameter ``member`` has the first gradient; returns its place from now on.

        The forward may have gone past the wrapper: through another method of the model, or the
        model inside; in eval mode it changes nothing, since one rank alone may evaluate.
        """
        trained, parameter = self.trained, self._hooked[member][1]
        with self.accounts.exposed():
            self._begin(self._forwards)
            self.strategy.backward_begins(takes_part=True)
        if self.trained is trained:
            return member
        return next(at for at, (_, hooked) in enumerate(self._hooked) if hooked is parameter)

    def _begin(self, forwards: int | None) -> None:
        """Prepare a backward for which ``forwards`` were run; None: this rank has no samples."""
        # After a forward through the wrapper only this can have changed: the whole comparison
        # takes five times as long.
        self._keep_up(self._guard.retrained() if self._compared else self._guard.changed())
        self._compared, self._forwards = False, 0
        attendance = attendance_of(self.world)
        if self.world.settings.check and attendance.complete:
            refuse_left_out(self.control.gather_json(forwards))
        self.weight = attendance.begin(self, self.samples, self.total)

    def _look_at(self, member: int, gradient: torch.Tensor) -> None:
        """Raise GradientError for one that must not be reduced."""
        name = self._hooked[member][0]
        if member < self.num_dense and gradient.is_sparse:
            raise GradientError(
                f"the gradient of {name!r} is sparse, but it is not the weight of a "
                "torch.nn.Embedding or EmbeddingBag that had sparse=True when the model was "
                "wrapped. Set sparse before wrapping, or use sparse=False"
            )
        if self._nan_check != "off" and member < len(self.trained):
            check_finite(self._nan_check, name, gradient, self.world)

    def _finish(self) -> None:
        """The end of a backward of this rank's."""
        attendance_of(self.world).finish(self)
        self.shadow_finish()

    def step_begins(self, optimizer: torch.optim.Optimizer, in_backward: bool) -> None:
        """``optimizer`` is about to step some of these parameters."""
        if self.synchronises:
            self.strategy.step_begins(optimizer, in_backward)

    # Backwards in which this rank has no gradients.

    def contribute_nothing(self) -> None:
        """This rank has no sample: take part in a backward of the others all the same."""
        if self._guard.rests:
            return  # no rank has a gradient
        self._begin(None)
        self.strategy.backward_begins(takes_part=False)
        self._finish()

    def begin_together(self) -> None:
        """Let all ranks enter ``join()`` with the same plan. Collective."""
        self._keep_up(self._guard.changed())

    def shadow_begin(self, weight: float) -> None:
        """Take part in a backward of other ranks with what is here already. Does not wait."""
        self.weight = weight
        self.strategy.backward_begins(takes_part=False)

    def shadow_finish(self) -> None:
        """The end of a backward of other ranks, or of this one's."""
        self._backward, self._unreduced = None, False
        self.backwards += 1
        self.strategy.backward_ended()

    @property
    def followed(self) -> bool:
        """Whether each forward through the wrapper was followed by a backward."""
        return self._unreduced or not self._compared

    @property
    def holds_unreduced(self) -> bool:
        """Whether ``no_sync`` has left gradients here that no backward has reduced since."""
        return self._unreduced and any(parameter.grad is not None for _, parameter in self.trained)

    def close(self) -> None:
        """The model is trained on this rank alone from now on. Collective."""
        self.strategy.close()
        detach(self, [parameter for _, parameter in self._hooked])
        self.control.close()


def broadcast_state(model: torch.nn.Module, world: World, root: int = 0) -> None:
    """Rank ``root``'s parameters and buffers on every rank. Collective; all in flight at once."""
    engine = engine_of(world)
    copies = [(tensor.detach(), gapless(tensor)) for _, tensor in named_state(model)]
    works = []
    for _, copy in copies:
        channel = MessageChannel(world, world.tags.foreground())
        device = device_of(copy)
        waits = broadcast(bytes_of(copy), root, channel, chunk_bytes_for(device, world))
        works.append(engine.submit(waits, world, device=device))
    for work, (tensor, copy) in zip(works, copies, strict=True):
        work.wait()
        if copy.data_ptr() != tensor.data_ptr():
            overwrite(tensor, copy)
