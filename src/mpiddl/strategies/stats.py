"""The costs of the exchange of one model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mpiddl.engine.scheduler import Scheduler
from mpiddl.gradients.bucket import Bucket

__all__ = ["Accounts", "BucketStats", "Stats"]


@dataclass
class BucketStats:
    """One bucket of the present plan, since it was laid out.

    Attributes:
        nbytes: Size of its gradients in bytes.
        parameters: Names of the parameters whose gradients are in it, whole or in part.
        exchanges: Number of exchanges so far.
        in_flight_seconds: Time from launch to completion, in all exchanges. On a GPU the launch is
            before the gradients are there.
        exposed_seconds: Time that the main thread waited for it, in all exchanges.
    """

    nbytes: int
    parameters: list[str]
    exchanges: int = 0
    in_flight_seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass
class Stats:
    """Sums since the model was wrapped, on this rank.

    Attributes:
        backwards: Backward passes whose gradients were reduced.
        reduced_bytes: Gradient bytes that went through the all-reduce.
        compute_seconds: Time of forwards in training and of backwards, without the exposed time.
            On a GPU with what the host waited for it at the end of backward.
        communication_seconds: The times of all buckets in flight, which overlap each other, added.
        exposed_seconds: Time in which the main thread did communication or waited for it, gradient
            hooks included: what the computation did not hide. On a GPU, which computes on
            meanwhile, without the hooks.
        buckets: The buckets of the present plan.
    """

    backwards: int = 0
    reduced_bytes: int = 0
    compute_seconds: float = 0.0
    communication_seconds: float = 0.0
    exposed_seconds: float = 0.0
    buckets: list[BucketStats] = field(default_factory=list)


class Accounts:
    """Keeps a model's statistics.

    Attributes:
        stats: The sums so far.
    """

    def __init__(self) -> None:
        self.stats = Stats()
        self._since: float | None = None  # backward's begin, by ``clock``
        self._outlasted = 0.0  # seconds, counted as computation already
        self._exposes = False
        self._counted = True

    def clock(self) -> float:
        """Seconds by a clock that stands still while time is exposed, or the host waits for what
        a GPU computes."""
        return time.perf_counter() - self.stats.exposed_seconds - self._outlasted

    @contextmanager
    def exposed(self) -> Iterator[None]:
        """Count the time inside as exposed; inside another such block it is counted already."""
        if self._exposes:
            yield
            return
        self._exposes, began = True, self.clock()
        try:
            yield
        finally:
            self._exposes = False
            self.stats.exposed_seconds += self.clock() - began

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time inside, a wait for what a GPU computes, as computation."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._outlasted += seconds
        self.stats.compute_seconds += seconds

    def forward_ended(self, output: Any, began: float) -> None:
        """A forward that is trained has run since ``began``; its backward will count too."""
        self.stats.compute_seconds += self.clock() - began
        node = None if torch.compiler.is_compiling() else _grad_fn_of(output)
        if node is not None:
            node.register_prehook(self._backward_began)

    def _backward_began(self, _gradients: Any) -> None:
        self._since = self.clock()

    def lay_out(self, buckets: Sequence[Bucket], names: Sequence[str]) -> None:
        """Count for these buckets from now on; ``names`` are the parameters', in model order."""
        self.stats.buckets = [
            BucketStats(bucket.buffer.nbytes, [names[member] for member in bucket.members])
            for bucket in buckets
        ]

    def backward_computed(self, hook_seconds: float) -> None:
        """Backward has nothing more to compute, and of its time its hooks took so much."""
        self.stats.exposed_seconds += hook_seconds
        if self._since is not None:
            self.stats.compute_seconds += self.clock() - self._since
            self._since = None
        self.stats.backwards += 1
        self.stats.reduced_bytes += sum(bucket.nbytes for bucket in self.stats.buckets)
        self._counted = False

    def count(self, scheduler: Scheduler) -> None:
        """Add the buckets of the last backward, unless that was done."""
        if self._counted:
            return
        self._counted = True
        columns = self.stats.buckets, scheduler.works, scheduler.exposed
        for bucket, work, waited in zip(*columns, strict=True):
            if work is not None and work.complete:
                bucket.exchanges += 1
                bucket.in_flight_seconds += work.seconds
                bucket.exposed_seconds += waited
                self.stats.communication_seconds += work.seconds
        scheduler.exposed = [0.0] * len(scheduler.exposed)


def _grad_fn_of(output: Any) -> torch.autograd.graph.Node | None:
    """The node at which backward begins: that of the first tensor in a model's output."""
    if isinstance(output, torch.Tensor):
        return output.grad_fn
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return next(filter(None, map(_grad_fn_of, output)), None)
    return None
