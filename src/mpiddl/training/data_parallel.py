"""``DataParallel``: a model whose gradients are averaged over ranks while backward runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mpiddl.buckets import agreement
from mpiddl.buckets.bucket import Bucket, spec_of
from mpiddl.buckets.plan import FIRST_BUCKET_BYTES, BucketPlan, plan_buckets
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.choose import choose
from mpiddl.collectives.reduction import FLOATS, Reduction
from mpiddl.comm.world import World, current_world
from mpiddl.devices.host import HOST
from mpiddl.errors import GradientError, MismatchError, UnsupportedBufferError
from mpiddl.overlap.calls import gather_json
from mpiddl.overlap.engine import engine_of
from mpiddl.overlap.scheduler import Scheduler
from mpiddl.training.state import broadcast_state
from mpiddl.units import parse_bytes
from mpiddl.waits import Waits

__all__ = ["DataParallel", "Stats"]


@dataclass
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
        check: Compare the plan (names, shapes, strides, dtypes, buckets) between ranks first,
            so that a difference is an error that names the parameter and not a hang.

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
    ) -> None:
        super().__init__()
        self.module = module
        self.world = world or current_world()
        named = _trained_parameters(module)
        self._names = [name for name, _ in named]
        parameters = [parameter for _, parameter in named]
        settings = self.world.settings
        self._algorithm_name = algorithm or settings.algorithm
        self._algorithms = {
            dtype: choose(self._algorithm_name, dtype)
            for dtype in {parameter.dtype for parameter in parameters}
        }
        specs = [spec_of(name, parameter) for name, parameter in named]
        capacity = _bytes(bucket_size) if bucket_size is not None else settings.bucket_size
        self.plan = plan_buckets(specs, capacity, FIRST_BUCKET_BYTES)
        if check:
            _agree(self.plan, self._algorithm_name, self.world)
        broadcast_state(module, self.world)

        self._buckets = [Bucket(planned, specs, parameters, HOST) for planned in self.plan.buckets]
        self._scheduler = self._make_scheduler()
        self._weight = 1 / self.world.size
        self._stats = Stats()
        self._synchronises = True
        self._in_backward = False
        self._backwards_in_batch = 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook_of(member))  # type: ignore[no-untyped-call]
            for member, parameter in enumerate(parameters)
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    # The way of a gradient.

    def _make_scheduler(self) -> Scheduler:
        tags = self.world.tags.keep(len(self._buckets))
        ordered = any(algorithm.ordered for algorithm in self._algorithms.values())
        native = self.world.new_native() if ordered else None
        channels = [Channel(self.world, tag, native) for tag in tags]
        chunk_bytes = self.world.settings.chunk_size

        def reduce(number: int, weight: float) -> Waits[None]:
            buffer = self._buckets[number].buffer
            run = self._algorithms[buffer.dtype].run
            scale = None if self.world.size == 1 and weight == 1 else weight
            return run(buffer, Reduction("sum", scale), channels[number], HOST, chunk_bytes)

        engine = engine_of(self.world)
        return Scheduler(self._buckets, self._names, reduce, ordered, engine)

    def _hook_of(self, member: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if not self._synchronises:
                return
            started = time.perf_counter()
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise GradientError(
                    f"the gradient of {self._names[member]!r} is sparse, which cannot be reduced "
                    "so far; make the embedding with sparse=False"
                )
            if not self._in_backward:
                self._in_backward = True
                self._scheduler.begin()
                # Autograd calls back once, after all gradients of this backward.
                torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            self._scheduler.ready(member, self._weight)
            self._stats.exposed_seconds += time.perf_counter() - started

        return hook

    def _end_of_backward(self) -> None:
        self._in_backward = False
        self._finish()

    def _finish(self) -> None:
        started = time.perf_counter()
        self._scheduler.finish()
        self._backwards_in_batch += 1
        self._stats.backwards += 1
        self._stats.reduced_bytes += sum(bucket.buffer.nbytes for bucket in self._buckets)
        self._stats.exposed_seconds += time.perf_counter() - started

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
            ValueError: ``local`` is negative or larger than ``total``, or ``total`` is 0.
            MismatchError: With MPIDDL_CHECK=1: the parts of all ranks do not add up to ``total``.
        """
        if not 0 <= local <= total or total == 0:
            raise ValueError(f"expected 0 <= local <= total and total > 0, got {local} of {total}")
        if self.world.settings.check:
            _check_shares(local, total, self.world)
        before = self._weight
        self._weight = local / total
        self._backwards_in_batch = 0
        try:
            yield
            if local == 0 and self._backwards_in_batch == 0 and self._synchronises:
                self._scheduler.contribute_zeros(0.0)
                self._finish()
        finally:
            self._weight = before

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients on this rank, to accumulate; the next backward outside reduces them."""
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before

    def stats(self) -> Stats:
        """What the exchange has cost since the model was wrapped."""
        return self._stats

    # A module like the one inside.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Into the wrapped model, under its own names; on every rank, or replicas differ."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet: do not look for it in itself
                raise
            return getattr(self.module, name)


def _trained_parameters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters that require a gradient, each once, in the model's order."""
    for name, child in module.named_modules():
        if isinstance(child, DataParallel):
            where = f"its submodule {name!r}" if name else "the model"
            raise ValueError(f"{where} is wrapped in DataParallel already; wrap the model once")
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient: nothing to reduce"
        )
    for name, parameter in named:
        if isinstance(parameter, torch.nn.UninitializedParameter):
            raise UnsupportedBufferError(
                f"parameter {name!r} has no shape yet; run one forward before wrapping"
            )
        if parameter.device.type != "cpu":
            raise UnsupportedBufferError(
                f"parameter {name!r} is on {parameter.device}; only models on the CPU can be "
                "trained so far"
            )
        if parameter.dtype not in FLOATS:
            raise UnsupportedBufferError(
                f"parameter {name!r} is {parameter.dtype}; valid are "
                + ", ".join(str(dtype) for dtype in FLOATS)
            )
    return named


def _bytes(size: int | str) -> int:
    return parse_bytes(size) if isinstance(size, str) else size


def _agree(plan: BucketPlan, algorithm: str, world: World) -> None:
    """Stop on every rank if plans differ; only then are they sent whole."""
    digests = gather_json([plan.digest(), algorithm], world=world)
    if any(digest != digests[0] for digest in digests):
        lines = [f"algorithm: {algorithm}", *agreement.describe(plan)]
        raise agreement.first_difference(gather_json(lines, world=world))


def _check_shares(local: int, total: int, world: World) -> None:
    """Weights that do not sum to one scale the gradient, and nothing else would tell."""
    shares = gather_json([local, total], world=world)
    summed = sum(part for part, _ in shares)
    if any(claimed != summed for _, claimed in shares):
        raise MismatchError(
            f"model.batch(local=, total=): the ranks hold {[part for part, _ in shares]} samples, "
            f"{summed} together, but were told total={[claimed for _, claimed in shares]}"
        )
