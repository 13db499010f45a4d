"""What an overlap benchmark compares: ways to train one model on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

import mpiddl
from mpiddl.api.all_reduce import all_reduce
from mpiddl.api.barrier import barrier
from mpiddl.bench.competitors.processes import Peer
from mpiddl.bench.models import ModelSpec
from mpiddl.bench.steps import LEARNING_RATE, Cost, Training, Way, sgd
from mpiddl.bench.timing import wait_for
from mpiddl.comm.world import World
from mpiddl.devices.registry import device_at
from mpiddl.errors import PeerError
from mpiddl.training.data_parallel import DataParallel

__all__ = [
    "ENGINES",
    "NAMES",
    "USUAL",
    "Candidate",
    "Options",
    "Others",
    "candidates",
    "expanded",
]

LIBRARY_OF = {"ddp": "gloo", "ddp/views": "gloo", "ddp/nccl": "nccl", "horovod": "horovod"}
NAMES = ("none", "none/again", "after", "mpiddl", "next", *LIBRARY_OF)
USUAL = {"cpu": "none/again,mpiddl,next,ddp,horovod", "cuda": "none/again,mpiddl,next,ddp,ddp/nccl"}
"""Those that are compared unless the user says more."""
ENGINES = ("inline", "after", "thread", "auto")
WITH_ENGINE = ("mpiddl", "next")


@dataclass(frozen=True)
class Options:
    """How the candidates are set up.

    Attributes:
        bucket_size: mpiddl's; None: its default.
        ddp_bucket_size: torch DDP's, in bytes; None: its default.
    """

    bucket_size: int | str | None = None
    ddp_bucket_size: int | None = None


class Candidate(Protocol):
    """One way to train. Every method is collective."""

    name: str

    def run(self, steps: int) -> Cost:
        """What one step costs on this rank; one more before is not counted."""
        ...

    def changes(self) -> list[float]:
        """A fingerprint of what training has changed in the parameters."""
        ...


class _Here:
    """Trains in this process."""

    def __init__(
        self, name: str, spec: ModelSpec, make_way: Callable[[nn.Module], Way], world: World
    ) -> None:
        self.name = name
        meet = functools.partial(barrier, world=world)
        self._training = Training(spec, world.rank, make_way, meet, str(world.device))

    def run(self, steps: int) -> Cost:
        return self._training.run(steps)

    def changes(self) -> list[float]:
        return self._training.changes()


class _Beside:
    """Trains in another library's process beside this one."""

    def __init__(
        self, name: str, spec: ModelSpec, peer: Peer, options: dict[str, Any], device: str
    ) -> None:
        self.name = name
        self._peer = peer
        peer.order("train", training=name, spec=spec.as_dict(), options=options, device=device)

    def run(self, steps: int) -> Cost:
        return Cost(*self._peer.order("run", training=self.name, steps=steps))

    def changes(self) -> list[float]:
        changed: list[float] = self._peer.order("changes", training=self.name)
        return changed


class Others:
    """Processes of other libraries, started when first asked for, kept for all models."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._peers: dict[str, Peer] = {}

    def find(self, library: str) -> Peer:
        """The process beside this rank. Collective.

        Raises:
            PeerError: On every rank: it cannot be had.
        """
        sharers = self._world.gpu_sharers
        if library == "nccl" and sharers != 1:
            why = f"up to {sharers} ranks share one" if sharers else "these have none"
            raise PeerError(f"ddp/nccl needs a GPU for each rank, and {why}")
        if library not in self._peers:
            self._peers[library] = Peer(library, self._world)
        return self._peers[library]


def expanded(names: Sequence[str], engines: Sequence[str]) -> list[str]:
    """``mpiddl`` becomes ``mpiddl/inline`` and so on; what all are compared with comes first."""
    wanted = ["none", "after"]
    for name in names:
        wanted += [f"{name}/{engine}" for engine in engines] if name in WITH_ENGINE else [name]
    return list(dict.fromkeys(wanted))


def candidates(
    names: Sequence[str], spec: ModelSpec, options: Options, others: Others, world: World
) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates of these (``expanded``) names, and why others of them cannot run. Collective."""
    found: list[Candidate] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            if name in LIBRARY_OF:
                settings = {"bucket_size": options.ddp_bucket_size, "views": name == "ddp/views"}
                peer, device = others.find(LIBRARY_OF[name]), str(world.device)
                found.append(_Beside(name, spec, peer, settings, device))
            else:
                kind, _, engine = name.partition("/")
                make_way = functools.partial(WAYS[kind], engine, options, world)
                found.append(_Here(name, spec, make_way, world))
        except PeerError as error:
            missing[name] = str(error)
    return found, missing


def _none(_engine: str, _options: Options, world: World, model: nn.Module) -> Way:
    """Each rank for itself; they wait for each other where others would exchange, so that
    waiting for a slower rank is not counted as communication."""

    def meet() -> None:
        wait_for(device_at(world.device).settled())  # where backward really is over
        barrier(world=world)

    return Way(model, sgd(model), exchange=meet)


def _after(_engine: str, _options: Options, world: World, model: nn.Module) -> Way:
    """What one would write by hand: when backward is over, all gradients as one buffer."""
    parameters = list(model.parameters())
    buffer = mpiddl.empty(sum(parameter.numel() for parameter in parameters), world=world)
    parts = torch.split(buffer, [parameter.numel() for parameter in parameters])
    views = [part.view_as(each) for part, each in zip(parts, parameters, strict=True)]

    def exchange() -> None:
        for parameter, view in zip(parameters, views, strict=True):
            assert parameter.grad is not None
            view.copy_(parameter.grad)
            parameter.grad = view
        all_reduce(buffer, "mean", world=world)

    return Way(model, sgd(model), exchange)


def _wrapped(engine: str, options: Options, world: World, model: nn.Module) -> DataParallel:
    if engine == "thread" and not world.allows_threads:
        raise PeerError("the engine's thread: this MPI grants no MPI_THREAD_MULTIPLE")
    return DataParallel(model, world=world, bucket_size=options.bucket_size, engine=engine)


def _mpiddl(engine: str, options: Options, world: World, model: nn.Module) -> Way:
    return Way(_wrapped(engine, options, world, model), sgd(model))


def _next(engine: str, options: Options, world: World, model: nn.Module) -> Way:
    wrapped = _wrapped(engine, options, world, model)
    optimizer = mpiddl.OverlappedOptimizer(torch.optim.SGD, wrapped, lr=LEARNING_RATE)
    return Way(wrapped, optimizer, settle=optimizer.synchronize)


WAYS: dict[str, Callable[[str, Options, World, nn.Module], Way]] = {
    "none": _none,
    "after": _after,
    "mpiddl": _mpiddl,
    "next": _next,
}
