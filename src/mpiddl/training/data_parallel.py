"""``DataParallel``: a model whose gradients are averaged over ranks while backward runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from mpiddl.buckets.bucket import Bucket, State, spec_of
from mpiddl.buckets.plan import plan_buckets
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.choose import choose
from mpiddl.collectives.lanes import kept_lanes
from mpiddl.collectives.reduction import Reduction
from mpiddl.comm import flight
from mpiddl.comm.world import World, current_world
from mpiddl.devices.host import HOST
from mpiddl.errors import GradientError, MismatchError
from mpiddl.events import Kind, new_model, record
from mpiddl.overlap.calls import gather_json
from mpiddl.overlap.engine import engine_of
from mpiddl.overlap.scheduler import Scheduler
from mpiddl.overlap.spans import span
from mpiddl.overlap.work import Work
from mpiddl.training.state import broadcast_state
from mpiddl.training.wrapping import (
    agree_on_plan,
    attach,
    describe_plan,
    detach,
    trained_parameters,
)
from mpiddl.units import parse_bytes
from mpiddl.waits import Waits

__all__ = ["DataParallel", "Stats"]


@dataclasses.dataclass
class Stats:
    """What the exchange has cost so far.

    Attributes:
        backwards: Backward passes whose gradients were reduced.
        reduced_bytes: Gradient bytes that went through the all-reduce on this rank.
        exposed_seconds: Time in which this rank's main thread did communication or waited for
            it, gradient hooks included: what the computation did not hide.
    """

    backwards: int = 0
    reduced_bytes: int = 0
    exposed_seconds: float = 0.0


class DataParallel(torch.nn.Module):
    """Wraps a model so that ``backward()`` leaves the mean gradient over ranks in ``param.grad``.

    Collective: every rank wraps the same model. Parameters and buffers become rank 0's. The
    rest of the training loop stays as it is; any torch optimizer works.

    Gradients are views of a few large buckets. A bucket is exchanged as soon as its last
    gradient is there, while backward goes on; ``backward()`` returns when all are complete.
    Two backward calls before a step equal one on the summed loss.

    ``state_dict()`` and ``load_state_dict()`` use the names of the wrapped model, without a
    ``module.`` in front; attributes that the wrapper lacks are looked up in the wrapped model,
    which is ``.module``.

    Args:
        module: The model, on the CPU.
        world: The ranks; default those of ``mpiddl.init()``.
        bucket_size: Largest bucket, in bytes or as ``"25MiB"``; default MPIDDL_BUCKET_SIZE.
        algorithm: All-reduce algorithm; default MPIDDL_ALGORITHM, else ``"auto"``.
        check: Compare names, shapes, strides, dtypes and buckets between ranks first, so that a
            difference is an error that names the parameter and not a hang.
        trace: A folder; from now on every rank writes what it does, and when, into a file there
            (docs/tracing.md). The same as MPIDDL_TRACE, which begins at ``mpiddl.init()``.

    Raises:
        ValueError: The model is wrapped already, or has nothing to train.
        UnsupportedBufferError: A parameter that cannot be reduced (GPU, complex, integer).
        MismatchError: Ranks wrapped different models.

    Source:
        Li et al., "PyTorch Distributed", PVLDB 13(12), 2020.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        world: World | None = None,
        bucket_size: int | str | None = None,
        algorithm: str | None = None,
        check: bool = True,
        trace: str | Path | None = None,
    ) -> None:
        super().__init__()
        if trace is not None:
            flight.trace_into(Path(trace))
        self.module = module
        self.world = world or current_world()
        settings = self.world.settings
        algorithm = algorithm or settings.algorithm
        named = trained_parameters(module)
        self._names = [name for name, _ in named]
        self._parameters_reduced = [parameter for _, parameter in named]
        self._known = set(map(id, self._parameters_reduced))
        specs = [spec_of(name, parameter) for name, parameter in named]
        capacity = parse_bytes(bucket_size) if isinstance(bucket_size, str) else bucket_size
        self.plan = plan_buckets(specs, settings.bucket_size if capacity is None else capacity)
        planned = self.plan.buckets
        dtypes = [getattr(torch, bucket.dtype) for bucket in planned]
        lengths = [bucket.length for bucket in planned]
        if check:
            agree_on_plan(module, self.plan, algorithm, self.world)
        broadcast_state(module, self.world)

        lanes = kept_lanes(self.world, len(planned))
        self._algorithms = [
            choose(algorithm, dtype, length * dtype.itemsize, self.world, lanes=None not in lanes)
            for length, dtype in zip(lengths, dtypes, strict=True)
        ]
        buffers = [HOST.empty(*kind, self.world) for kind in zip(lengths, dtypes, strict=True)]
        self._buckets = [
            Bucket(bucket, specs, self._parameters_reduced, buffer)
            for bucket, buffer in zip(planned, buffers, strict=True)
        ]
        self._nbytes = sum(bucket.buffer.nbytes for bucket in self._buckets)
        self._tags = self.world.tags.keep(len(planned))
        ordered = any(chosen.algorithm.ordered for chosen in self._algorithms)
        native = self.world.bucket_native if ordered else None
        self._channels = [
            Channel(self.world, tag, native, lane)
            for tag, lane in zip(self._tags, lanes, strict=True)
        ]
        self._engine = engine_of(self.world)
        self._number = new_model()
        self._scheduler = Scheduler(self._buckets, self._names, ordered, self._engine, self._number)
        describe_plan(self._number, self.plan, self._tags)
        self._weight: float | None = None  # of this rank in the sum, inside batch()
        self._stats = Stats()
        self._synchronises = True
        self._backward: int | None = None  # autograd's number for the one that runs
        attach(self, self._names, self._parameters_reduced)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            self._check_parameters()
        with span(Kind.FORWARD_BEGIN, self._number):
            return self.module(*args, **kwargs)

    # The way of a gradient.

    def gradient_ready(self, member: int, parameter: torch.nn.Parameter) -> None:
        """Called by the hook of parameter ``member`` when autograd has finished its gradient."""
        if not self._synchronises:
            return
        started = time.perf_counter()
        name = self._names[member]
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise GradientError(
                f"the gradient of {name!r} is sparse, which cannot be reduced so far; make the "
                "embedding with sparse=False"
            )
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._scheduler.begin()
            self._backward = backward
            # Autograd calls back once, after all gradients of this backward.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._scheduler.ready(member, self._reduce)
        self._stats.exposed_seconds += time.perf_counter() - started

    def _reduce(self, number: int) -> Work:
        """Start the all-reduce of bucket ``number``."""
        self.world.check_open()
        buffer = self._buckets[number].buffer
        weight = 1 / self.world.size if self._weight is None else self._weight
        reduction = Reduction("sum", None if self.world.size == 1 else weight)
        chosen, channel = self._algorithms[number], self._channels[number]
        waits = chosen.run(buffer, reduction, channel, HOST)
        return self._engine.submit(self._noting_its_end(waits, number), self.world)

    def _noting_its_end(self, waits: Waits[None], number: int) -> Waits[None]:
        yield from waits
        bucket = self._buckets[number]
        bucket.state = State.COMPLETE
        record(Kind.COMPLETE, self._number, number, bucket.buffer.nbytes)

    def _finish(self) -> None:
        started = time.perf_counter()
        self._backward = None
        self._scheduler.finish()
        self._stats.backwards += 1
        self._stats.reduced_bytes += self._nbytes
        self._stats.exposed_seconds += time.perf_counter() - started

    def _check_parameters(self) -> None:
        """Refuse to train what would stay on this rank: parameters new or unfrozen since."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._known:
                raise GradientError(
                    f"parameter {name!r} was not trained, or not there, when the model was "
                    "wrapped: its gradient would stay on this rank. unwrap() and wrap again"
                )

    # What users control.

    @contextmanager
    def batch(self, *, local: int, total: int) -> Iterator[None]:
        """Weight this rank's gradients by its share ``local / total`` of the global batch.

        For losses that are means over the local samples: the result is then the gradient of the
        mean over all ``total`` samples, also when ranks hold different numbers of them. A rank
        with ``local=0`` contributes zeros, whether it calls ``backward()`` (as often as the
        others) or not (if the others do once). Without this every rank weighs the same.

        Args:
            local: Samples of this rank.
            total: Samples of all ranks together, the same on every rank.

        Raises:
            ValueError: ``local`` is negative or larger than ``total``, or ``total`` is 0; or
                inside ``no_sync()``, where gradients of several batches share one weight.
            MismatchError: With MPIDDL_CHECK=1: the parts of all ranks do not add up to ``total``.
        """
        if not 0 <= local <= total or total == 0:
            raise ValueError(f"expected 0 <= local <= total and total > 0, got {local} of {total}")
        if not self._synchronises or self._weight is not None:
            raise ValueError(
                "model.batch() inside no_sync() or another batch(): gradients that are "
                "accumulated cannot have weights of their own. Leave no_sync() out: two backward "
                "calls equal one on the summed loss"
            )
        if self.world.settings.check:
            _check_shares(local, total, self.world)
        self._weight = local / total
        before = self._stats.backwards
        try:
            yield
            if local == 0 and self._stats.backwards == before:
                self._scheduler.contribute_zeros(self._reduce)
                self._finish()
        finally:
            self._weight = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients on this rank, to accumulate; the next backward outside reduces them.

        Raises:
            ValueError: Inside ``batch()``, as there.
        """
        if self._weight is not None:
            raise ValueError("no_sync() inside model.batch(): see model.batch()")
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before

    def stats(self) -> Stats:
        """What the exchange has cost since the model was wrapped."""
        return dataclasses.replace(self._stats)

    def unwrap(self) -> torch.nn.Module:
        """Take the hooks off and return the model inside. Collective; the wrapper is of no use
        afterwards, and the model can be wrapped again."""
        detach(self._parameters_reduced)
        self.world.tags.give_back(self._tags)
        self._tags = []
        return self.module

    # A module like the one inside.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Into the wrapped model, under its own names; on every rank, or replicas differ."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Reached when a module around this one loads: hand the names on to the model inside.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            inner = f"{prefix}module.{name.removeprefix(prefix)}"
            state_dict[inner] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a DataParallel belongs to this job; copy or save model.module instead")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet: do not look for it in itself
                raise
            return getattr(self.module, name)


def _check_shares(local: int, total: int, world: World) -> None:
    """Weights that do not sum to one scale the gradient, and nothing else would tell."""
    shares = gather_json([local, total], world=world)
    summed = sum(part for part, _ in shares)
    if any(claimed != summed for _, claimed in shares):
        raise MismatchError(
            f"model.batch(local=, total=): the ranks hold {[part for part, _ in shares]} samples, "
            f"{summed} together, but were told total={[claimed for _, claimed in shares]}"
        )
