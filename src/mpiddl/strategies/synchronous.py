"""Gradients are averaged over all ranks, in buckets, while backward runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from mpiddl.base.log import logger
from mpiddl.compress.base import Codec, hook_of
from mpiddl.devices.registry import device_of
from mpiddl.engine.bucket_reductions import BucketReductions
from mpiddl.engine.engine import engine_of
from mpiddl.engine.scheduler import Scheduler
from mpiddl.gradients.arena import Gradients, arenas_for, spec_of
from mpiddl.gradients.bucket import Bucket
from mpiddl.gradients.checksums import refuse_difference
from mpiddl.gradients.plan import BucketPlan
from mpiddl.observe.events import Kind, record
from mpiddl.strategies.base import Strategy
from mpiddl.strategies.buffers import BufferBroadcast
from mpiddl.strategies.calibration import Choice
from mpiddl.strategies.options import Options, agree_on_options
from mpiddl.strategies.plans import Plans, agree_on_plan, describe_plan
from mpiddl.strategies.replica import Replica
from mpiddl.strategies.sparse import SparseGradients
from mpiddl.strategies.stats import Stats
from mpiddl.strategies.unused import Unused
from mpiddl.strategies.weights import attendance_of

__all__ = ["Synchronous"]


class Synchronous(Strategy):
    """Every bucket is reduced as soon as its last gradient is there; after backward all replicas
    have the same gradients.

    Args:
        options: The options that the user chose.
        codec: Exchanges each bucket in place of an all-reduce; None: nothing does.

    Attributes:
        engine: Drives the buckets.
        names, parameters: The trained parameters with dense gradients, in the model's order.
        sparse: The trained parameters with sparse gradients.
        plans, plan: The plans of this model, and the present one.
        gradients: The memory of the buckets of the present plan.
        scheduler: Starts the buckets of the present backward.
        reductions: Reduces each bucket.
        unused: Knows the parameters without a gradient.

    Source:
        Li et al., "PyTorch Distributed", PVLDB 13(12), 2020.
    """

    plan: BucketPlan
    gradients: Gradients
    scheduler: Scheduler

    def __init__(self, options: Options, codec: Codec | None = None) -> None:
        self._options = options
        self._codec = codec
        self._next: tuple[BucketPlan, Choice] | None = None  # for the next backward
        self._takes_part = True  # this rank, with gradients, in the backward that runs
        self._warned = False  # of gradients that went past the exchange

    def bind(self, replica: Replica) -> None:
        super().bind(replica)
        options, world = self._options, replica.world
        self.engine = engine_of(world)
        agree_on_options(options, replica.control)
        self.reductions = BucketReductions(world, options.algorithm, replica.number)
        broadcasts = options.broadcast_buffers
        self._buffers = BufferBroadcast(replica.module, replica.control) if broadcasts else None
        self.plans = Plans(options, world, replica.control)
        if self._codec is not None:
            self.reductions.hook = hook_of(self._codec, self.reductions)

    def use_codec(self, codec: Codec) -> None:
        """Let ``codec`` exchange each bucket from the next backward on."""
        self._codec, self.reductions.hook = codec, hook_of(codec, self.reductions)
        codec.plan_changed(self.gradients.buckets)

    # The plan.

    def plan_changed(self) -> None:
        replica = self.replica
        dense, sparse = replica.trained[: replica.num_dense], replica.trained[replica.num_dense :]
        self.names = [name for name, _ in dense]
        self.parameters = [parameter for _, parameter in dense]
        self.sparse = SparseGradients([n for n, _ in sparse], [p for _, p in sparse])
        specs = [spec_of(name, parameter) for name, parameter in dense]
        first = replica.trained[0][1]
        self._device = device_of(first)
        plan, choice = self.plans.first(specs, first.device.type)
        if self._options.check:
            algorithm = self._options.algorithm
            agree_on_plan(replica.module, plan, algorithm, self.sparse.names, replica.control)
        self._arenas = arenas_for(plan, self._device, replica.world)
        self.unused = Unused(self.parameters, self.names, self._options.static_graph)
        self.plan_ahead(plan, choice)
        self._lay_out()

    def plan_ahead(self, plan: BucketPlan, choice: Choice) -> None:
        """The next backward begins with this plan. Collective."""
        self.reductions.reserve(len(plan.buckets), self._device)
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
            self.replica.number,
            self.reductions,
            self.engine,
            choice.engine == "after",
            self.scheduler.backwards if hasattr(self, "scheduler") else 0,
        )
        self.replica.accounts.lay_out(self.gradients.buckets, self.names)
        describe_plan(self.replica.number, self.plan, self.reductions.tags)
        if self._codec is not None:
            self._codec.plan_changed(self.gradients.buckets)

    # A step, from top to bottom.

    def forward_begins(self) -> None:
        if self.late_step is not None:
            self.late_step.forward_begins()

    def backward_begins(self, takes_part: bool) -> None:
        self.synchronize()
        self.count()
        self.scheduler.refuse_left_over()
        if self._next is not None:
            self.gradients.release()
            self._lay_out()
        self.scheduler.begin(self.replica.weight)
        self._takes_part = takes_part
        if self._options.lets_absent:
            self.unused.begin()
            self.scheduler.contribute_nothing(sorted(self.unused.here or ()))
        if not takes_part:
            self.scheduler.contribute_nothing(self.scheduler.absent)

    def gradient_ready(self, member: int) -> None:
        dense = self.replica.num_dense
        if member < dense:
            if self._options.static_graph:
                self.unused.refuse(member)
            self.scheduler.ready(member)
        else:
            self.sparse.refuse(member - dense)

    def backward_ended(self) -> None:
        accounts = self.replica.accounts
        accounts.backward_computed(self.scheduler.seconds)
        with accounts.exposed():
            self._exchange_the_rest()

    def _exchange_the_rest(self) -> None:
        replica, attendance = self.replica, attendance_of(self.replica.world)
        self.scheduler.no_more()
        if self._options.lets_absent:
            self._settle_unused()
        self.scheduler.refuse_absent()
        if self._buffers is not None:
            self._buffers.start(attendance.root)
        if self.sparse.parameters and replica.world.size > 1:
            self.sparse.reduce(replica.weight, replica.world, replica.control)
        if self.late_step is None:
            self.wait()
        else:
            self.late_step.backward_ended()
        record(Kind.BACKWARD_END, replica.number, value=self.scheduler.backwards)
        if attendance.complete:  # else some ranks may not come here any more
            self._look_ahead()

    def _settle_unused(self) -> None:
        absent = self.scheduler.absent
        knows = self.unused.here is not None  # then nothing else may be missing
        self.unused.settle(absent if self._takes_part else None, self.replica.control)
        if not knows:
            self.scheduler.contribute_nothing(absent)

    def _look_ahead(self) -> None:
        """Agree on what changes with the next backward. All ranks come here together."""
        following = self.plans.next(self.plan, self.scheduler.arrived)
        if following is not None:
            self.plan_ahead(*following)
        every = self._options.check_replicas_every
        if every and self.replica.accounts.stats.backwards % every == 0:
            self.synchronize()
            # Frozen ones too: a gradient that went past the exchange shows there.
            named = dict(self.replica.module.named_parameters())
            refuse_difference(named, self.replica.control.gather_json)

    def step_begins(self, optimizer: torch.optim.Optimizer, in_backward: bool) -> None:
        if self.late_step is not None and self.late_step.optimizer is optimizer:
            return
        super().step_begins(optimizer, in_backward)
        if not self.replica.followed and not self._warned:
            self._warn_of_foreign_gradients()

    def _warn_of_foreign_gradients(self) -> None:
        """Gradients should be the old ones after a forward that no backward has followed."""
        views = self.gradients.views
        for name, parameter, view in zip(self.names, self.parameters, views, strict=True):
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

    # Waits.

    def wait(self, buckets: Collection[Bucket] | None = None) -> None:
        """Wait for these buckets, or for everything that the last backward left in flight."""
        with self.replica.accounts.exposed():
            if self.scheduler.late:
                with self.replica.accounts.computing():
                    self.scheduler.outlast(buckets)
            self.scheduler.wait(buckets)
        if buckets is None:
            self.unused.restore()
            self.wait_for_buffers()

    def wait_for_buffers(self) -> None:
        """Wait for the model's buffers alone."""
        if self._buffers is not None:
            with self.replica.accounts.exposed():
                self._buffers.finish()

    def count(self) -> Stats:
        self.replica.accounts.count(self.scheduler)
        return super().count()

    def synchronize(self) -> None:
        if self.late_step is not None:
            self.late_step.synchronize()

    def close(self) -> None:
        if self.late_step is not None:
            self.late_step.close()
        self.reductions.close()

    # What was found out in the first steps.

    def state_dict(self) -> dict[str, Any]:
        return self.plans.describe()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.synchronize()
        self.plan_ahead(*self.plans.adopt(self.plan, state))
