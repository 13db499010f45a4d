"""What a bandwidth benchmark compares: mpiddl's algorithms, the MPI library, other libraries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS, choose
from mpiddl.comm.native import NATIVE_DTYPES, NATIVE_OPS
from mpiddl.comm.world import World
from mpiddl.errors import PeerError, UnsupportedBufferError
from mpiddl.measure.patterns import count_wrong, fill, lengths
from mpiddl.measure.peers import PEERS, Peer
from mpiddl.measure.timing import seconds_of

__all__ = ["PLACEMENTS", "Buffers", "Candidate", "Case", "InProcess", "candidates", "names_of"]

PLACEMENTS = ("empty", "plain")
"""mpiddl.empty, and a tensor of torch's."""


@dataclass(frozen=True)
class Case:
    """What is measured: ``nbytes`` in all, as nccl-tests counts them."""

    collective: str
    nbytes: int
    dtype: torch.dtype
    op: str

    @property
    def length(self) -> int:
        return self.nbytes // self.dtype.itemsize


class Candidate(Protocol):
    """One way to run a collective, on one kind of memory."""

    name: str
    placement: str

    def prepare(self, case: Case, check: bool) -> int:
        """Run once; the number of wrong elements on this rank, 0 unless ``check``. Collective.

        Raises:
            UnsupportedBufferError, PeerError: It cannot do this; on every rank.
        """
        ...

    def time(self, calls: int, fresh: bool) -> float:
        """Seconds per call, from a barrier on. Collective.

        With ``fresh`` the input is written before each call, outside of the time.
        """
        ...


def names_of(collective: str) -> list[str]:
    """Every name that --algorithms may give."""
    own = ["auto", *ALGORITHMS] if collective == "all-reduce" else ["auto"]
    return [*own, *(["library"] if "library" not in own else []), *PEERS]


class Buffers:
    """Memory of one placement for the largest case, used by all candidates."""

    def __init__(self, placement: str, collective: str, nbytes: int, world: World) -> None:
        make: Callable[..., torch.Tensor] = torch.empty
        if placement == "empty":
            make = mpiddl.empty
        self.placement = placement
        count = 1 if collective in ("all-reduce", "broadcast") else 2
        self._memory = [make(nbytes, dtype=torch.uint8) for _ in range(count)]
        in_windows = [world.windows.find(memory.data_ptr())[0] for memory in self._memory]
        self.usable = placement == "plain" or world.size == 1 or all(in_windows)

    def views(self, case: Case, world: World) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and output; the same where a collective works in place."""
        before, after = lengths(case.collective, case.length, world.size)
        sizes = before * case.dtype.itemsize, after * case.dtype.itemsize
        memory = self._memory[0], self._memory[-1]
        pair = [part[:size].view(case.dtype) for part, size in zip(memory, sizes, strict=True)]
        return pair[0], pair[1]


class InProcess(ABC):
    """A collective that this process runs."""

    def __init__(self, name: str, buffers: Buffers, world: World) -> None:
        self.name = name
        self.placement = buffers.placement
        self._buffers = buffers
        self._world = world
        self._call: Callable[[], Any] = lambda: None

    def prepare(self, case: Case, check: bool) -> int:
        source, target = self._buffers.views(case, self._world)
        self._call, self._source = self.bind(case, source, target), source
        rank, size = self._world.rank, self._world.size
        fill(source, rank, size, case.op)
        self._call()
        wrong = count_wrong(target, case.collective, rank, size, case.op) if check else 0
        source.zero_()
        return wrong

    def time(self, calls: int, fresh: bool) -> float:
        return seconds_of(self._call, calls, mpiddl.barrier, self._source if fresh else None)

    @abstractmethod
    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        """What ``time`` calls."""


class _Own(InProcess):
    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        op = case.op
        if case.collective == "all-reduce":
            choose(self.name, case.dtype, source.nbytes, self._world)  # raises, if it cannot
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
    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        dtype = str(case.dtype).removeprefix("torch.")
        adds = case.collective in ("all-reduce", "reduce-scatter")
        if adds and (dtype not in NATIVE_DTYPES or case.op not in NATIVE_OPS):
            raise UnsupportedBufferError(f"the MPI library has no {case.op} of {dtype}")
        pair = [(tensor.data_ptr(), tensor.nbytes) for tensor in (source, target)]
        return self._world.native.blocking(case.collective, pair[0], pair[1], dtype, case.op)


class _Beside:
    """A collective that a process beside this one runs."""

    placement = "plain"

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._peer = Peer(name, world)

    def prepare(self, case: Case, check: bool) -> int:
        dtype = str(case.dtype).removeprefix("torch.")
        arguments = {"length": case.length, "dtype": dtype, "op": case.op, "check": check}
        wrong: int = self._peer.order("prepare", collective=case.collective, **arguments)
        return wrong

    def time(self, calls: int, fresh: bool) -> float:
        seconds: float = self._peer.order("time", calls=calls, fresh=fresh)
        return seconds


def candidates(
    names: Sequence[str], collective: str, nbytes: int, world: World
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates called ``names``, and why others of them cannot run. Collective."""
    found: list[Candidate] = []
    missing: dict[str, str] = {}
    own = [name for name in names if name not in PEERS]
    placements = [Buffers(place, collective, nbytes, world) for place in PLACEMENTS if own]
    for name in names:
        if name in PEERS:
            try:
                found.append(_Beside(name, world))
            except PeerError as error:
                missing[name] = str(error)
        else:
            kind = _Library if name == "library" else _Own
            found += [kind(name, buffers, world) for buffers in placements if buffers.usable]
    return found, missing
