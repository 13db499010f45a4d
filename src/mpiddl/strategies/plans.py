"""Which buckets a model has: the same on every rank, and others after the first steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from mpiddl.comm.world import World
from mpiddl.engine.control import Control
from mpiddl.gradients import agreement
from mpiddl.gradients.arena import spec_of
from mpiddl.gradients.plan import BucketPlan, ParameterSpec, plan_buckets
from mpiddl.gradients.state import named_state
from mpiddl.observe.events import Kind, describe, record
from mpiddl.strategies.calibration import Calibration, Choice
from mpiddl.strategies.options import Options

__all__ = ["Plans", "agree_on_plan", "describe_plan"]


class Plans:
    """Plans, the same on every rank.

    Args:
        options: The options that the user chose.
        world: The ranks.
        control: Carries what they agree on.
    """

    def __init__(self, options: Options, world: World, control: Control) -> None:
        self._options = options
        self._world = world
        self._control = control
        self._calibration: Calibration | None = None
        self._order: list[int] | None = None

    def first(self, specs: Sequence[ParameterSpec], kind: str) -> tuple[BucketPlan, Choice]:
        """The plan for these parameters, on a device of this ``kind``, before a backward has shown
        anything. Collective."""
        if self._calibration is None:
            model = agreement.digest([str(spec) for spec in specs])
            self._calibration = Calibration(self._options, self._world, self._control, model, kind)
        self._order = None
        choice = self._calibration.present
        return plan_buckets(specs, choice.bucket_size), choice

    def describe(self) -> dict[str, Any]:
        """The choices that were made by measuring: plain JSON, for ``adopt``."""
        assert self._calibration is not None
        settled = self._calibration.settled
        return {
            "settled": self._calibration.present._asdict() if settled else None,
            "order": self._order,
        }

    def adopt(self, plan: BucketPlan, found: Mapping[str, Any]) -> tuple[BucketPlan, Choice]:
        """Use from the next backward on what an earlier job with these parameters found out;
        the same on every rank."""
        assert self._calibration is not None
        self._calibration.settle(found["settled"])
        order = found["order"]
        if order is not None and sorted(order) == list(range(len(plan.parameters))):
            self._order = order
        choice = self._calibration.present
        return plan_buckets(plan.parameters, choice.bucket_size, order=self._order), choice

    def next(self, plan: BucketPlan, arrived: Sequence[int]) -> tuple[BucketPlan, Choice] | None:
        """The plan that follows ``plan`` with the next backward, if it changes. Collective: all
        ranks come here after each backward.

        Args:
            plan: The present one.
            arrived: Parameters in the order in which their gradients came.
        """
        assert self._calibration is not None
        choice = self._calibration.after_backward()
        default = list(range(len(plan.parameters)))[::-1]
        reordered = False
        if self._order is None:
            self._order = default
            if self._options.rebuild_buckets:
                # Those that did not come are last. Rank 0's word.
                order = [*arrived, *(m for m in default if m not in set(arrived))]
                self._order = self._control.broadcast_json(order)
                reordered = self._order != default
        if choice is None and not reordered:
            return None
        choice = choice or self._calibration.present
        return plan_buckets(plan.parameters, choice.bucket_size, order=self._order), choice


def agree_on_plan(
    module: torch.nn.Module,
    plan: BucketPlan,
    algorithm: str,
    sparse: Collection[str],
    control: Control,
) -> None:
    """Stop on every rank if they wrap different models. Collective.

    Raises:
        MismatchError: Names the first parameter, buffer or bucket that differs.
    """
    state = [spec_of(name, tensor) for name, tensor in named_state(module)]
    lines = agreement.describe(plan, state, algorithm, sparse)
    digests = control.gather_json(agreement.digest(lines))
    if any(theirs != digests[0] for theirs in digests):  # only then send them whole
        raise agreement.first_difference(control.gather_json(lines))


def describe_plan(model: int, plan: BucketPlan, tags: Sequence[int]) -> None:
    """Tell readers of events which parameters are in which bucket of model ``model``."""
    specs = plan.parameters
    nbytes = [bucket.length * specs[bucket.members[0]].itemsize for bucket in plan.buckets]
    buckets = [
        {"members": bucket.members, "nbytes": length, "tag": tag}
        for bucket, length, tag in zip(plan.buckets, nbytes, tags, strict=False)
    ]
    describe(model, [spec.name for spec in specs], buckets)
    record(Kind.PLAN, model, len(buckets), sum(nbytes))
