"""From a backward of one model to its reduced gradients."""

from __future__ import annotations

import torch

from mpiddl.base.log import logger
from mpiddl.comm.world import World
from mpiddl.devices.registry import device_of
from mpiddl.engine.bucket_reductions import BucketReductions
from mpiddl.engine.control import Control
from mpiddl.engine.engine import engine_of
from mpiddl.engine.scheduler import Scheduler
from mpiddl.engine.work import Work
from mpiddl.errors import GradientError
from mpiddl.gradients.arena import Gradients, arenas_for, spec_of
from mpiddl.gradients.bucket import Bucket
from mpiddl.gradients.plan import BucketPlan
from mpiddl.observe.events import Kind, new_model, record
from mpiddl.training.buffers import BufferBroadcast
from mpiddl.training.calibration import Choice
from mpiddl.training.checksums import refuse_difference
from mpiddl.training.finite import check_finite
from mpiddl.training.in_flight import InFlight, two_backwards
from mpiddl.training.join.announcements import announcements_of
from mpiddl.training.late_step.deferral import Deferral
from mpiddl.training.model_guard import Roster
from mpiddl.training.options import Options, agree_on_options
from mpiddl.training.plans import Plans
from mpiddl.training.sparse import SparseGradients, sparse_weights
from mpiddl.training.stats import Accounts, Stats
from mpiddl.training.step_watch import watch_steps
from mpiddl.training.sync_batch_norm import adopt_batch_norms
from mpiddl.training.unused import Unused
from mpiddl.training.weights import refuse_left_out, weight_of_backward
from mpiddl.training.wrapping import (
    agree_on_plan,
    attach,
    describe_plan,
    detach,
    trained_parameters,
    watched_parameters,
)

__all__ = ["Reducer"]

_number_of_backward = torch._C._current_graph_task_id


class Reducer:
    """Hooks in a model's parameters, and what they set off.

    Args:
        module: The model.
        world: The ranks.
        options: What the user chose.

    Attributes:
        number: Of this model among those of the process, in events.
        names, parameters: Those with dense gradients, in the model's order.
        sparse: The trained parameters with sparse gradients.
        plan, plans, gradients: Their buckets, how those change, and the buckets' memory.
        scheduler: The buckets of the present backward.
        reductions: How they are reduced.
        samples: Of this rank, inside ``batch()``.
        total: Of all ranks, inside ``batch()``; None: ``join()`` tells.
        synchronises: Whether a backward reduces.
        accounts: What it has cost.
        engine: Drives the buckets.
        unused: Parameters without a gradient.
        deferral: Waits for the buckets in place of the end of backward.
    """

    plan: BucketPlan
    gradients: Gradients
    scheduler: Scheduler

    def __init__(self, module: torch.nn.Module, world: World, options: Options) -> None:
        watch_steps()
        self.number = new_model()
        self.world = world
        adopt_batch_norms(self, module)
        self.samples: int | None = None
        self.total: int | None = None
        self.synchronises = True
        self.deferral: Deferral | None = None
        self.accounts = Accounts()
        self.names: list[str] = []
        self.parameters: list[torch.nn.Parameter] = []
        self.sparse = SparseGradients([], [])
        self._hooked: list[tuple[str, torch.nn.Parameter]] = []  # trained, then frozen ones
        self._module = module
        self._weight = 1 / world.size  # of this rank in the sum of the backward that runs
        self._takes_part = True  # in the backward that runs
        self._unreduced = False
        self._options = options
        self.engine = engine_of(world)
        self._control = Control(world)
        agree_on_options(options, self._control)
        self.reductions = BucketReductions(world, options.algorithm, self.number)
        self._buffers = (
            BufferBroadcast(module, self._control) if options.broadcast_buffers else None
        )
        self._looks = options.nan_check != "off" or options.static_graph
        self.plans = Plans(options, world, self._control)
        self._compared = False  # the model, in a forward since the last backward
        self._forwards = 0  # since the last backward
        self._warned = False  # of gradients that went past the exchange
        self._backward: int | None = None  # autograd's number for the one that runs
        self._next: tuple[BucketPlan, Choice] | None = None  # for the next backward
        self.replan()

    # The plan.

    def replan(self) -> None:
        """Plan for the parameters that are trained now. Collective."""
        named = trained_parameters(self._module, self)
        self._roster = Roster(self._module)
        detach(self, [parameter for _, parameter in self._hooked])
        others = sparse_weights(self._module)
        dense = [(name, parameter) for name, parameter in named if id(parameter) not in others]
        self.names = [name for name, _ in dense]
        self.parameters = [parameter for _, parameter in dense]
        self._num_dense, self._num_trained = len(dense), len(named)
        sparse = [(name, parameter) for name, parameter in named if id(parameter) in others]
        self.sparse = SparseGradients([n for n, _ in sparse], [p for _, p in sparse])
        specs = [spec_of(name, parameter) for name, parameter in dense]
        plan, choice = self.plans.first(specs, named[0][1].device.type)
        if self._options.check:
            algorithm = self._options.algorithm
            agree_on_plan(self._module, plan, algorithm, self.sparse.names, self._control)
        self._arenas = arenas_for(plan, device_of(self.trained[0]), self.world)
        self.unused = Unused(self.parameters, self.names, self._options.static_graph)
        self.plan_ahead(plan, choice)
        self._lay_out()
        self._hooked = [*dense, *sparse, *watched_parameters(self._module, self)]
        names, parameters = zip(*self._hooked, strict=True)
        attach(self, names, parameters, len(named))

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """All trained parameters: those with dense gradients, then the others."""
        return [*self.parameters, *self.sparse.parameters]

    def plan_ahead(self, plan: BucketPlan, choice: Choice) -> None:
        """The next backward begins with this plan. Collective."""
        self.reductions.reserve(len(plan.buckets), device_of(self.trained[0]))
        self._next = plan, choice

    def _lay_out(self) -> None:
        """Cut the arenas anew. Nothing is in flight, and nobody waits for other ranks here."""
        assert self._next is not None
        (self.plan, choice), self._next = self._next, None
        self.gradients = Gradients(self.plan, self.parameters, self._arenas)
        self.reductions.threaded = choice.engine == "thread"
        self.reductions.fit(self.gradients.buckets, self.gradients.device)
        self.scheduler = Scheduler(
            self.gradients,
            self.names,
            self.number,
            self.reductions.ordered,
            self.engine,
            choice.engine == "after",
            self.scheduler.backwards if hasattr(self, "scheduler") else 0,
        )
        self.accounts.lay_out(self.gradients.buckets, self.names)
        describe_plan(self.number, self.plan, self.reductions.tags)

    # The way of a gradient.

    def forward_begins(self) -> None:
        """A forward that is trained; collective if parameters were frozen or unfrozen before it."""
        if self.deferral is not None:
            self.deferral.forward_begins()
        self.keep_up(self._roster.changed())
        self._compared = True
        self._forwards += 1

    def begin_together(self) -> None:
        """Before ``join()``: ranks begin with the same plan. Collective."""
        self.keep_up(self._roster.changed())

    def keep_up(self, changed: bool) -> None:
        """Plan anew if parameters were frozen or unfrozen; collective then.

        Raises:
            GradientError: Inside ``join()``, where ranks that have left cannot follow.
        """
        if not changed:
            return
        if announcements_of(self.world) is not None:
            raise GradientError(
                "parameters were frozen or unfrozen inside mpiddl.join(), where ranks that have "
                "left the block could not follow. Do that outside of the block, on every rank"
            )
        if self.deferral is not None:
            self.deferral.synchronize()
        self.replan()

    def gradient_ready(self, member: int, parameter: torch.nn.Parameter) -> None:
        """Called by the hook of parameter ``member`` when autograd has finished its gradient."""
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
        dense = member < self._num_dense
        if gradient.is_sparse is dense or self._looks or member >= self._num_trained:
            self._look_at(member, gradient)
        if dense:
            self.scheduler.ready(member, self._start)

    def _backward_begins(self, member: int) -> int:
        """Parameter ``member`` has the first gradient; gives its place from now on.

        The forward may have gone past the wrapper: through another method of the model, or the
        model inside; in eval mode it changes nothing, since one rank alone may evaluate.
        """
        plan, parameter = self.plan, self._hooked[member][1]
        with self.accounts.exposed():
            self._keep_up_in_backward(self._forwards)
            self._weight = weight_of_backward(self, self.samples, self.total)
            self._begin()
        if self.plan is plan:
            return member
        return next(at for at, (_, hooked) in enumerate(self._hooked) if hooked is parameter)

    def _keep_up_in_backward(self, forwards: int | None) -> None:
        """Before anything is reduced. ``forwards`` were run for it; None: by a rank that has no
        samples."""
        # After a forward through the wrapper only this can have changed: the whole comparison
        # takes five times as long.
        self.keep_up(self._roster.retrained() if self._compared else self._roster.changed())
        self._compared, self._forwards = False, 0
        if self.world.settings.check and announcements_of(self.world) is None:
            refuse_left_out(self._control.gather_json(forwards))

    def _look_at(self, member: int, gradient: torch.Tensor) -> None:
        """Raise GradientError for one that must not be reduced."""
        if member >= self._num_trained:
            raise GradientError(
                f"parameter {self._hooked[member][0]!r} was unfrozen in the middle of a backward: "
                "its gradient would stay on this rank. Unfreeze parameters before backward"
            )
        dense = member < self._num_dense
        if dense and gradient.is_sparse:
            raise GradientError(
                f"the gradient of {self.names[member]!r} is sparse, but it is not the weight of a "
                "torch.nn.Embedding or EmbeddingBag that had sparse=True when the model was "
                "wrapped. Set sparse before wrapping, or use sparse=False"
            )
        if not dense:
            self.sparse.refuse(member - self._num_dense)
        if self._options.nan_check != "off":
            name = self._hooked[member][0]
            check_finite(self._options.nan_check, name, gradient, self.world)
        if dense:
            self.unused.refuse(member)

    def _begin(self) -> None:
        if self.deferral is not None:
            self.deferral.synchronize()
        self.count()
        self.scheduler.begin()
        if self._next is not None:
            self.gradients.release()
            self._lay_out()
        self._takes_part = True
        if self._options.lets_absent:
            self.unused.begin()
            self.scheduler.contribute_nothing(sorted(self.unused.here or ()), self._start)

    def _start(self, bucket: Bucket) -> Work:
        return self.reductions.start(bucket, None if self.world.size == 1 else self._weight)

    def _finish(self) -> None:
        """The end of a backward of this rank's."""
        joined = announcements_of(self.world)
        if joined is not None:
            joined.finish(self)
        self.shadow_finish()

    def step_begins(self, optimizer: torch.optim.Optimizer, in_backward: bool) -> None:
        """Called before an optimizer steps some of these parameters.

        Raises:
            GradientError: In the middle of a backward: their gradients are this rank's own still.
        """
        if not self.synchronises or (
            self.deferral is not None and self.deferral.optimizer is optimizer
        ):
            return
        if in_backward:
            raise GradientError(
                f"{type(optimizer).__name__}.step() was called during backward, by a gradient "
                "hook: the gradients are not reduced yet, and the replicas would drift apart. Step "
                "after backward, or use mpiddl.OverlappedOptimizer, which updates each parameter "
                "as soon as its gradient is reduced"
            )
        if self._compared and not self._unreduced and not self._warned:
            self._warn_of_foreign_gradients()

    def _warn_of_foreign_gradients(self) -> None:
        """After a forward that no backward has followed, gradients should be those of before."""
        for name, parameter, view in zip(
            self.names, self.parameters, self.gradients.views, strict=True
        ):
            gradient = parameter.grad
            if gradient is not None and gradient.data_ptr() != view.data_ptr():
                self._warned = True
                logger.warning(
                    "parameter %r is stepped with a gradient that no backward has brought: those "
                    "of torch.autograd.grad, and others that are set by hand, are this rank's own. "
                    "If they are not averaged yet: p.grad = mpiddl.all_reduce(g, op='mean')",
                    name,
                )
                return

    def contribute_nothing(self) -> None:
        """This rank has no sample: take part in a backward of the others all the same."""
        if self._roster.rests:
            return  # no rank has a gradient
        self._keep_up_in_backward(None)
        self.shadow_begin(weight_of_backward(self, self.samples, self.total))
        self._finish()

    def shadow_begin(self, weight: float) -> None:
        """Take part in every bucket of a backward with what is in it already. Does not wait."""
        self._weight = weight
        self._begin()
        self._takes_part = False
        self.scheduler.contribute_nothing(self.scheduler.absent, self._start)

    def shadow_finish(self) -> None:
        """The end of a backward of other ranks, or of this one's."""
        self.accounts.backward_computed(self.scheduler.seconds)
        self._backward, self._unreduced = None, False
        with self.accounts.exposed():
            self._exchange_the_rest()

    def _exchange_the_rest(self) -> None:
        joined = announcements_of(self.world)
        self.scheduler.no_more(self._start)
        if self._options.lets_absent:
            self._settle_unused()
        self.scheduler.refuse_absent()
        if self._buffers is not None:
            self._buffers.start(0 if joined is None else joined.root)
        if self.sparse.parameters and self.world.size > 1:
            self.sparse.reduce(self._weight, self.world, self._control)
        if self.deferral is None:
            self.wait()
        else:
            self.deferral.backward_ended()
        record(Kind.BACKWARD_END, self.number, value=self.scheduler.backwards)
        if joined is None:  # else some ranks may not come here any more
            self._look_ahead()

    def _settle_unused(self) -> None:
        absent = self.scheduler.absent
        knows = self.unused.here is not None  # then nothing else may be missing
        self.unused.settle(absent if self._takes_part else None, self._control)
        if not knows:
            self.scheduler.contribute_nothing(absent, self._start)

    def wait(self) -> None:
        """Wait for everything that the last backward left in flight."""
        self.accounts.wait(self.scheduler)
        self.unused.restore()
        self.wait_for_buffers()

    def wait_for_buffers(self) -> None:
        """Wait for the model's buffers alone."""
        if self._buffers is not None:
            with self.accounts.exposed():
                self._buffers.finish()

    def count(self) -> Stats:
        """What the exchange has cost so far."""
        self.accounts.count(self.scheduler)
        return self.accounts.stats

    def _look_ahead(self) -> None:
        """Agree on what changes with the next backward. All ranks come here together."""
        following = self.plans.next(self.plan, self.scheduler.arrived)
        if following is not None:
            self.plan_ahead(*following)
        every = self._options.check_replicas_every
        if every and self.accounts.stats.backwards % every == 0:
            if self.deferral is not None:
                self.deferral.synchronize()
            # Frozen ones too: a gradient that went past the exchange shows there.
            refuse_difference(dict(self._module.named_parameters()), self._control.gather_json)

    @property
    def holds_unreduced(self) -> bool:
        """Whether ``no_sync`` has left gradients here that no backward has reduced since."""
        return self._unreduced and any(p.grad is not None for p in self.trained)

    @property
    def share(self) -> int:
        """What this rank's loss weighs, in relation to other ranks'."""
        return 1 if self.samples is None else self.samples

    def close(self) -> None:
        """The model is trained on this rank alone from now on. Collective."""
        detach(self, [parameter for _, parameter in self._hooked])
        self.reductions.close()
        self._control.close()
