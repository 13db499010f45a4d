"""Who takes part in a bandwidth benchmark: mpiddl's algorithms, the MPI, other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import mpiddl
from mpiddl.api.objects import gather_json
from mpiddl.base.units import format_bytes
from mpiddl.bench.candidates import PLACEMENTS, Buffers, Candidate, Case, InProcess
from mpiddl.bench.competitors.processes import PEERS, Peer
from mpiddl.bench.memory import check_room
from mpiddl.bench.sendrecv import SENDRECV, SendRecv
from mpiddl.collectives.choose import ALGORITHMS, Chosen, choose
from mpiddl.comm.native import NATIVE_DTYPES, NATIVE_OPS
from mpiddl.comm.world import World
from mpiddl.devices.registry import device_at
from mpiddl.errors import PeerError, UnsupportedBufferError

__all__ = ["BESIDE", "ON_GPUS", "candidates", "names_of", "stagings_of"]

BESIDE = tuple(name for name in PEERS if name not in ALGORITHMS)
"""Other libraries; NCCL's all-reduce is called here, by mpiddl itself."""
ON_GPUS = ("gloo",)
"""Of these, those that are timed on GPU memory too."""


def names_of(collective: str) -> list[str]:
    """Every name that --algorithms may give."""
    own = ["auto", *ALGORITHMS] if collective == "all-reduce" else ["auto"]
    others = [*(["library"] if "library" not in own else []), *BESIDE]
    return [*own, *others, *([SENDRECV] if collective == "all-reduce" else [])]


def stagings_of(world: World, wanted: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """How messages go while they are measured, and why not in other ways. Collective.

    Args:
        world: The ranks.
        wanted: ``"device"``, ``"host"``; none: as they go in training.

    Raises:
        PeerError: On every rank, if none of them is possible.
    """
    everyones = gather_json(list(device_at(world.device).stagings(world)), world=world)
    able = [way for way in everyones[0] if all(way in theirs for theirs in everyones)]
    if not wanted:
        return [*able[:1]] or [None], []
    missing = [
        f"staging {way!r}: not every rank's MPI reads GPU memory; `mpiddl doctor` tells why"
        for way in wanted
        if way not in able
    ]
    if len(missing) == len(wanted):
        raise PeerError(missing[0])
    return [way for way in wanted if way in able], missing


class _Own(InProcess):
    def sends(self, case: Case) -> bool:
        if case.collective != "all-reduce":
            return super().sends(case)
        algorithm = self._chosen(case).algorithm
        # Those of a library have ways of their own; lanes are on the host.
        in_place = algorithm.lanes and self._buffers.mapped and self._world.num_nodes == 1
        return super().sends(case) and not algorithm.ordered and not in_place

    def _chosen(self, case: Case) -> Chosen:
        """As all_reduce chooses."""
        mapped = self.name == "hierarchical" and self._buffers.mapped
        device = self._buffers.device
        nbytes = case.length * case.dtype.itemsize
        return choose(self.name, case.dtype, nbytes, self._world, device=device, mapped=mapped)

    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        op = case.op
        if case.collective == "all-reduce":
            chosen = self._chosen(case)  # raises, if it cannot
            if chosen.algorithm.gpu:  # NCCL starts now, or cannot
                mpiddl.all_reduce(source[:0], op, algorithm=self.name, world=self._world)
            algorithm = None if self.name == self._world.settings.algorithm else self.name
            return lambda: mpiddl.all_reduce(source, op, algorithm=algorithm)
        if case.collective == "broadcast":
            return lambda: mpiddl.broadcast(source)
        if case.collective == "reduce-scatter":
            return lambda: mpiddl.reduce_scatter(target, source, op)
        if case.collective == "all-gather":
            return lambda: mpiddl.all_gather(target, source)
        return lambda: mpiddl.all_to_all(target, source)


class _Library(InProcess):
    """On host memory; that of a GPU goes the way of ``mpiddl.all_reduce(algorithm="library")``."""

    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        dtype = str(case.dtype).removeprefix("torch.")
        adds = case.collective in ("all-reduce", "reduce-scatter")
        if adds and (dtype not in NATIVE_DTYPES or case.op not in NATIVE_OPS):
            raise UnsupportedBufferError(f"the MPI library has no {case.op} of {dtype}")
        pair = [(tensor.data_ptr(), tensor.nbytes) for tensor in (source, target)]
        return self._world.native.blocking(case.collective, pair[0], pair[1], dtype, case.op)


class _Beside:
    """A collective that a process beside this one runs, on the same kind of memory."""

    placement = "plain"

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._place = str(world.device)
        self._peer = Peer(name, world)

    def staging_of(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, check: bool) -> int | None:
        arguments: dict[str, Any] = {
            "collective": case.collective,
            "length": case.length,
            "dtype": str(case.dtype).removeprefix("torch."),
            "op": case.op,
            "check": check,
        }
        wrong: int | None = self._peer.order("prepare", device=self._place, **arguments)
        return wrong

    def time(self, calls: int, fresh: bool) -> float:
        seconds: float = self._peer.order("time", calls=calls, fresh=fresh)
        return seconds


def candidates(
    names: Sequence[str],
    collective: str,
    nbytes: int,
    world: World,
    stagings: Sequence[str | None] = (None,),
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates called ``names``, and why others of them cannot run. Collective."""
    found: list[Candidate] = []
    missing: dict[str, str] = {}
    own = [name for name in names if name not in BESIDE]
    room = Buffers.count(collective) * len(PLACEMENTS if own else ()) * nbytes
    check_room(room, f"{collective} of {format_bytes(nbytes)}", world)
    placements = [Buffers(place, collective, nbytes, world) for place in PLACEMENTS if own]
    on_gpu = device_at(world.device).late
    for name in names:
        if on_gpu and name in BESIDE and name not in ON_GPUS:
            missing[name] = f"{name} is timed on host memory only"
        elif on_gpu and name == "library" and collective != "all-reduce":
            missing[name] = f"library: MPI's own {collective} is not given GPU memory"
        elif name in BESIDE:
            try:
                found.append(_Beside(name, world))
            except PeerError as error:
                missing[name] = str(error)
        else:
            kind = _kind_of(name, on_gpu)
            found += [
                kind(name, buffers, world, staging)
                for buffers in placements
                if buffers.usable
                for staging in stagings
            ]
    return found, missing


def _kind_of(name: str, on_gpu: bool) -> type[InProcess]:
    if name == SENDRECV:
        return SendRecv
    return _Library if name == "library" and not on_gpu else _Own
