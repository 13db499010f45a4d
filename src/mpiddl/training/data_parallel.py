"""``DataParallel``: a model whose gradients are averaged over ranks while backward runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mpiddl.base.compiled_names import in_names_of
from mpiddl.base.waits import Waits
from mpiddl.comm.world import World, current_world
from mpiddl.compress.base import Codec, GradientBucket
from mpiddl.compress.comm_hook import CommHook
from mpiddl.gradients.hooks import NotWrapped
from mpiddl.gradients.plan import BucketPlan
from mpiddl.observe import flight_recorder
from mpiddl.observe.events import Kind
from mpiddl.observe.spans import span
from mpiddl.strategies.base import Strategy
from mpiddl.strategies.options import options_from
from mpiddl.strategies.replica import Replica, broadcast_state
from mpiddl.strategies.stats import Stats
from mpiddl.strategies.synchronous import Synchronous
from mpiddl.strategies.weights import check_share
from mpiddl.training.sync_batch_norm import adopt_batch_norms

__all__ = ["DataParallel"]


class DataParallel(torch.nn.Module):
    """Wraps a model so that ``backward()`` leaves the mean gradient over ranks in ``param.grad``.

    Collective: every rank wraps the same model. Parameters and buffers become rank 0's. The
    rest of the training loop stays as it is; any torch optimizer works.

    Gradients are views of a few large buckets. A bucket is exchanged as soon as its last
    gradient is there, while backward goes on; ``backward()`` returns when all are complete.
    Two backward calls before a step equal one on the summed loss. Sparse gradients of embeddings
    (``sparse=True``) are in no bucket; they are added up at the end of backward.

    ``state_dict()`` and ``load_state_dict()`` use the names of the wrapped model, without a
    ``module.`` in front; attributes that the wrapper lacks are looked up in the wrapped model,
    which is ``.module``.

    A copy (``copy.deepcopy``, pickle, ``torch.save``) is a wrapper of its own around a copy of the
    model. It costs nothing until it is trained: its first forward in training wraps, collectively.
    Comm hooks and optimizers stay with the original.

    Args:
        module: The model, on the CPU or on this rank's GPU (``world.device``).
        world: The ranks; default those of ``mpiddl.init()``.
        bucket_size: Largest bucket, in bytes or as ``"25MiB"``, or ``"auto"`` to measure it in the
            first steps; default MPIDDL_BUCKET_SIZE, and 25 MiB on a GPU where that is not set.
        algorithm: All-reduce algorithm; default MPIDDL_ALGORITHM, else ``"auto"``.
        engine: What drives the exchange: ``"inline"``, the gradient hooks; ``"thread"``, a thread
            as well; ``"after"``, nobody before backward is over; ``"auto"``, measured in the first
            steps; default MPIDDL_ENGINE.
        check: Compare names, shapes, strides, dtypes and buckets between ranks first, so that a
            difference is an error that names the parameter and not a hang.
        find_unused_parameters: Parameters may get no gradient, different ones on each rank and in
            each step. Costs a small exchange at the end of each backward.
        static_graph: Parameters may get no gradient, the same ones in every step: they are found
            out once.
        broadcast_buffers: At the end of each backward all ranks get rank 0's buffers.
        rebuild_buckets: After the first backward buckets follow the order in which gradients
            came on rank 0.
        nan_check: ``"warn"`` or ``"error"``: look for NaN and infinity in each gradient before it
            is reduced, and name parameter and rank. One pass over the gradients.
        check_replicas_every: Backwards between two checks that all ranks have the same
            parameters, to the last bit; 0: never.
        strategy: When and how replicas are made equal; default ``Synchronous``, whose options the
            arguments above are.
        compression: How each bucket is written for the wire and read back, such as
            ``mpiddl.compress.BF16()``; default: as it is.
        trace: A folder; from now on every rank writes what it does, and when, into a file there
            (docs/tracing.md). The same as MPIDDL_TRACE, which begins at ``mpiddl.init()``.

    Raises:
        ValueError: The model is wrapped already, or has nothing to train; a bad argument.
        UnsupportedBufferError: A parameter that cannot be reduced (complex, integer), or a model
            that is not on one device.
        GpuMemoryError: A GPU has no room for the gradients.
        MismatchError: Ranks wrapped different models.

    Source:
        Li et al., "PyTorch Distributed", PVLDB 13(12), 2020.
    """

    _not_wrapped: NotWrapped | None = None

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        world: World | None = None,
        bucket_size: int | str | None = None,
        algorithm: str | None = None,
        engine: str | None = None,
        check: bool = True,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        broadcast_buffers: bool = True,
        rebuild_buckets: bool = True,
        nan_check: str = "off",
        check_replicas_every: int = 200,
        strategy: Strategy | None = None,
        compression: Codec | None = None,
        trace: str | Path | None = None,
    ) -> None:
        super().__init__()
        if trace is not None:
            flight_recorder.trace_into(Path(trace))
        self.module = module
        self._world: World | None = world or current_world()
        self._options = options_from(
            self.world.settings,
            on_gpu=any(parameter.is_cuda for parameter in module.parameters()),
            bucket_size=bucket_size,
            algorithm=algorithm,
            engine=engine,
            nan_check=nan_check,
            check_replicas_every=check_replicas_every,
            check=check,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            broadcast_buffers=broadcast_buffers,
            rebuild_buckets=rebuild_buckets,
        )
        # A strategy and a codec belong to one model: copies of this one get copies of them.
        self._chosen = copy.copy(strategy), copy.copy(compression)
        self._replica: Replica | None = None
        self._strategy: Strategy | None = None
        self._wrap(strategy or Synchronous(self._options, compression))

    def _wrap(self, strategy: Strategy | None = None) -> Replica:
        if strategy is None:
            chosen, codec = self._chosen
            strategy = copy.copy(chosen) or Synchronous(self._options, copy.copy(codec))
        adopt_batch_norms(self, self.module)
        self._strategy = strategy
        self._replica = Replica(self.module, self.world, strategy, self._options.nan_check)
        broadcast_state(self.module, self.world)
        return self._replica

    @property
    def world(self) -> World:
        """The ranks. Of a wrapper that was saved, those of ``mpiddl.init()``."""
        if self._world is None:
            self._world = current_world()
        return self._world

    @property
    def replica(self) -> Replica:
        """The hooks in this model; for the library's own use. Collective in a new copy."""
        return self._replica or self._wrap()

    @property
    def strategy(self) -> Strategy:
        """When and how replicas are made equal. Collective in a new copy."""
        if self._strategy is None:
            self._wrap()
        assert self._strategy is not None
        return self._strategy

    @property
    def synchronous(self) -> Synchronous:
        """The strategy, where it is the default one.

        Raises:
            ValueError: It is another one.
        """
        strategy = self.strategy
        if not isinstance(strategy, Synchronous):
            raise ValueError(
                f"this needs the default strategy, and the model has {type(strategy).__name__}; "
                "leave strategy= out of DataParallel"
            )
        return strategy

    @property
    def share(self) -> int:
        """The weight of this rank's loss in relation to other ranks'."""
        samples = None if self._replica is None else self._replica.samples
        return 1 if samples is None else samples

    @property
    def plan(self) -> BucketPlan:
        """Which gradient is in which bucket."""
        return self.synchronous.plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        trains = self.training and torch.is_grad_enabled()
        if self._replica is None and torch.is_grad_enabled():
            self._copy_begins()
        if trains and self._replica is not None:
            self._forward_begins()
        owes = self._strategy is not None and self._strategy.late_step is not None
        if owes and (not trains or torch.compiler.is_compiling()):
            self._settle()  # what is compiled around this runs no hooks that could wait later
        if torch.compiler.is_compiling() or self._replica is None:
            return self.module(*args, **kwargs)  # what can be measured here is not worth a break
        began = self._replica.accounts.clock()
        with span(Kind.FORWARD_BEGIN, self._replica.number):
            output = self.module(*args, **kwargs)
        if trains:
            self._replica.accounts.forward_ended(output, began)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _copy_begins(self) -> None:
        """Wrap a copy that is trained. One that is frozen, or evaluated, sends nothing."""
        if all(not parameter.requires_grad for parameter in self.module.parameters()):
            return
        if self.training:
            self._wrap()
        elif self._not_wrapped is None:
            self._not_wrapped = NotWrapped(self.module)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_begins(self) -> None:
        self.replica.forward_begins()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self) -> None:
        self.synchronize()

    # What users control.

    @contextmanager
    def batch(self, *, local: int, total: int | None = None) -> Iterator[None]:
        """Weight this rank's gradients by its share ``local / total`` of the global batch.

        For losses that are means over the local samples: the result is then the gradient of the
        mean over all ``total`` samples, also when ranks hold different numbers of them. A rank
        with ``local=0`` contributes zeros, whether it calls ``backward()`` (as often as the
        others) or not (if the others do once). Without this every rank weighs the same.

        Args:
            local: Samples of this rank.
            total: Samples of all ranks together, the same on every rank. Inside
                ``mpiddl.join()`` it may be left out.

        Raises:
            ValueError: ``local`` is negative or larger than ``total``, or ``total`` is 0 or left
                out; or inside ``no_sync()``, where gradients of several batches share one weight.
            MismatchError: With MPIDDL_CHECK=1, or inside ``join()``: the parts of all ranks do not
                add up to ``total``.
        """
        replica = self.replica
        if not replica.synchronises or replica.samples is not None:
            raise ValueError(
                "model.batch() inside no_sync() or another batch(): gradients that are "
                "accumulated cannot have weights of their own. Leave no_sync() out: two backward "
                "calls equal one on the summed loss"
            )
        check_share(local, total, self.world)
        replica.samples, replica.total = local, total
        before = replica.backwards
        try:
            yield
            if local == 0 and replica.backwards == before:
                replica.contribute_nothing()
        finally:
            replica.samples = replica.total = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients on this rank, to accumulate; the next backward outside reduces them.

        Raises:
            ValueError: Inside ``batch()``, as there.
        """
        replica = self.replica
        if replica.samples is not None:
            raise ValueError("no_sync() inside model.batch(): see model.batch()")
        before, replica.synchronises = replica.synchronises, False
        try:
            yield
        finally:
            replica.synchronises = before

    def register_comm_hook(
        self, state: Any, hook: Callable[[Any, GradientBucket], Waits[None]]
    ) -> None:
        """Let ``hook(state, bucket)`` reduce each bucket; see ``mpiddl.compress.CommHook``.

        Every rank registers the same hook, between two backwards. The next one takes its place.

        Raises:
            TypeError: It cannot be called. (One that is no generator fails at its first bucket.)
        """
        self.synchronous.use_codec(CommHook(state, hook))

    def synchronize(self) -> None:
        """Wait until all parameters are updated, where an ``OverlappedOptimizer`` steps them."""
        if self._strategy is not None:
            self._strategy.synchronize()

    def stats(self) -> Stats:
        """The costs of the exchange since the model was wrapped."""
        return Stats() if self._strategy is None else copy.deepcopy(self._strategy.count())

    def choices(self) -> dict[str, Any]:
        """The choices of buckets and engine that were made in the first steps: plain JSON."""
        return self.strategy.state_dict()

    def adopt_choices(self, found: Mapping[str, Any]) -> None:
        """Begin with what ``choices()`` told in an earlier job, on as many ranks. Collective."""
        self.strategy.load_state_dict(dict(found))

    def unwrap(self) -> torch.nn.Module:
        """Take the hooks off and return the model inside. Collective; the wrapper is of no use
        afterwards, and the model can be wrapped again."""
        if self._replica is not None:
            self._replica.close()
        return self.module

    # A module like the one inside.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Into the wrapped model, under its own names; on every rank, or replicas differ.

        Also the state of this model compiled, where it is not, and the other way round.
        """
        here = self.module.state_dict()
        if any(name not in here for name in state_dict):
            state_dict = in_names_of(here, state_dict)
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Reached when a module around this one loads: hand the names on to the model inside.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            inner = f"{prefix}module.{name.removeprefix(prefix)}"
            state_dict[inner] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Copies.

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        other._world = self._world
        return other

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        return {
            **self.__dict__,
            "_world": None,
            "_replica": None,
            "_strategy": None,
            "_not_wrapped": None,
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet: do not look for it in itself
                raise
            # A compiled model's own attributes would make torch.compile take this for one.
            return getattr(getattr(self.module, "_orig_mod", self.module), name)
