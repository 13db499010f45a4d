"""``DataParallel``: a model whose gradients are averaged over ranks while backward runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mpiddl.base.compiled_names import in_names_of
from mpiddl.comm.world import World, current_world
from mpiddl.gradients.plan import BucketPlan
from mpiddl.observe import flight_recorder
from mpiddl.observe.events import Kind
from mpiddl.observe.spans import span
from mpiddl.training.comm_hooks import CommHook, hook_for_buckets
from mpiddl.training.options import options_from
from mpiddl.training.reducer import Reducer
from mpiddl.training.state import broadcast_state
from mpiddl.training.stats import Stats
from mpiddl.training.weights import check_share
from mpiddl.training.wrapping import NotWrapped

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
        engine: Who drives the exchange: ``"inline"``, the gradient hooks; ``"thread"``, a thread as
            well; ``"after"``, nobody before backward is over; ``"auto"``, measured in the first
            steps; default MPIDDL_ENGINE.
        check: Compare names, shapes, strides, dtypes and buckets between ranks first, so that a
            difference is an error that names the parameter and not a hang.
        find_unused_parameters: Parameters may get no gradient, different ones on each rank and in
            each step. Costs a small exchange at the end of each backward.
        static_graph: As that, but the same parameters get none in every step: found out once.
        broadcast_buffers: At the end of each backward all ranks get rank 0's buffers.
        rebuild_buckets: After the first backward buckets follow the order in which gradients
            came on rank 0.
        nan_check: ``"warn"`` or ``"error"``: look for NaN and infinity in each gradient before it
            is reduced, and name parameter and rank. One pass over the gradients.
        check_replicas_every: Backwards between two checks that all ranks have the same
            parameters, to the last bit; 0: never.
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
        self._reducer: Reducer | None = None
        self._wrap()

    def _wrap(self) -> Reducer:
        self._reducer = Reducer(self.module, self.world, self._options)
        broadcast_state(self.module, self.world)
        return self._reducer

    @property
    def world(self) -> World:
        """The ranks. Of a wrapper that was saved, those of ``mpiddl.init()``."""
        if self._world is None:
            self._world = current_world()
        return self._world

    @property
    def reducer(self) -> Reducer:
        """What reduces the gradients; for the library's own use. Collective in a new copy."""
        return self._reducer or self._wrap()

    @property
    def plan(self) -> BucketPlan:
        """Which gradient is in which bucket."""
        return self.reducer.plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        trains = self.training and torch.is_grad_enabled()
        if self._reducer is None and torch.is_grad_enabled():
            self._copy_begins()
        if trains and self._reducer is not None:
            self._forward_begins()
        owes = self._reducer is not None and self._reducer.deferral is not None
        if owes and (not trains or torch.compiler.is_compiling()):
            self._settle()  # what is compiled around this runs no hooks that could wait later
        if torch.compiler.is_compiling() or self._reducer is None:
            return self.module(*args, **kwargs)  # what can be measured here is not worth a break
        began = self._reducer.accounts.clock()
        with span(Kind.FORWARD_BEGIN, self._reducer.number):
            output = self.module(*args, **kwargs)
        if trains:
            self._reducer.accounts.forward_ended(output, began)
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
        self.reducer.forward_begins()

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
        reducer = self.reducer
        if not reducer.synchronises or reducer.samples is not None:
            raise ValueError(
                "model.batch() inside no_sync() or another batch(): gradients that are "
                "accumulated cannot have weights of their own. Leave no_sync() out: two backward "
                "calls equal one on the summed loss"
            )
        check_share(local, total, self.world)
        reducer.samples, reducer.total = local, total
        before = reducer.accounts.stats.backwards
        try:
            yield
            if local == 0 and reducer.accounts.stats.backwards == before:
                reducer.contribute_nothing()
        finally:
            reducer.samples = reducer.total = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients on this rank, to accumulate; the next backward outside reduces them.

        Raises:
            ValueError: Inside ``batch()``, as there.
        """
        reducer = self.reducer
        if reducer.samples is not None:
            raise ValueError("no_sync() inside model.batch(): see model.batch()")
        before, reducer.synchronises = reducer.synchronises, False
        try:
            yield
        finally:
            reducer.synchronises = before

    def register_comm_hook(self, state: Any, hook: CommHook) -> None:
        """Let ``hook(state, bucket)`` reduce each bucket; see ``mpiddl.training.comm_hooks``.

        Every rank registers the same hook, between two backwards. The next one takes its place.

        Raises:
            TypeError: It cannot be called. (One that is no generator fails at its first bucket.)
        """
        reducer = self.reducer
        reducer.reductions.hook = hook_for_buckets(state, hook, reducer.reductions.all_reduce)

    def synchronize(self) -> None:
        """Wait until all parameters are updated, where an ``OverlappedOptimizer`` steps them."""
        if self._reducer is not None and self._reducer.deferral is not None:
            self._reducer.deferral.synchronize()

    def stats(self) -> Stats:
        """What the exchange has cost since the model was wrapped."""
        return Stats() if self._reducer is None else copy.deepcopy(self._reducer.count())

    def choices(self) -> dict[str, Any]:
        """What was found out in the first steps, about buckets and engine: plain JSON."""
        return self.reducer.plans.describe()

    def adopt_choices(self, found: Mapping[str, Any]) -> None:
        """Begin with what ``choices()`` told in an earlier job, on as many ranks. Collective."""
        self.synchronize()
        reducer = self.reducer
        reducer.plan_ahead(*reducer.plans.adopt(reducer.plan, found))

    def unwrap(self) -> torch.nn.Module:
        """Take the hooks off and return the model inside. Collective; the wrapper is of no use
        afterwards, and the model can be wrapped again."""
        if self._reducer is not None:
            if self._reducer.deferral is not None:
                self._reducer.deferral.close()
            self._reducer.close()
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
        return {**self.__dict__, "_world": None, "_reducer": None, "_not_wrapped": None}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet: do not look for it in itself
                raise
            # A compiled model's own attributes would make torch.compile take this for one.
            return getattr(getattr(self.module, "_orig_mod", self.module), name)
