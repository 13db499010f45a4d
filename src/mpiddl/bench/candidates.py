"""What a bandwidth benchmark compares: cases, candidates and the memory that they work on."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import mpiddl
from mpiddl.bench.patterns import count_wrong, fill, lengths
from mpiddl.bench.timing import seconds_of, wait_for
from mpiddl.collectives.node.lanes import is_mapped
from mpiddl.comm.world import World
from mpiddl.devices.base import Device
from mpiddl.devices.registry import device_at

__all__ = ["PLACEMENTS", "Buffers", "Candidate", "Case", "InProcess"]

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

    def staging_of(self, case: Case) -> str | None:
        """How a GPU's messages go, ``"device"`` or ``"host"``; None if ``case`` sends none.

        Raises:
            UnsupportedBufferError: It cannot do this; on every rank.
        """
        ...

    def prepare(self, case: Case, check: bool) -> int | None:
        """Run once; with ``check``, the number of wrong elements on this rank. Collective.

        Raises:
            UnsupportedBufferError, PeerError: It cannot do this; on every rank.
        """
        ...

    def time(self, calls: int, fresh: bool) -> float:
        """Seconds per call, from a barrier on. Collective.

        With ``fresh`` the input is written before each call, outside of the time.
        """
        ...


class Buffers:
    """Memory of one placement for the largest case, used by all candidates.

    Attributes:
        device: That it is on.
        mapped: The other ranks of the node reach it.
        usable: It is what ``placement`` promises.
    """

    def __init__(self, placement: str, collective: str, nbytes: int, world: World) -> None:
        make: Callable[..., torch.Tensor] = torch.empty
        if placement == "empty":
            make = mpiddl.empty
        self.placement = placement
        self.device: Device = device_at(world.device)
        self._memory = [
            make(nbytes, dtype=torch.uint8, device=world.device)
            for _ in range(self.count(collective))
        ]
        self.mapped = all(is_mapped(memory, self.device, world) for memory in self._memory)
        self.usable = placement == "plain" or world.size == 1 or self.mapped

    @staticmethod
    def count(collective: str) -> int:
        """How many buffers of the full size a collective needs: one where it works in place."""
        return 1 if collective in ("all-reduce", "broadcast") else 2

    def views(self, case: Case, world: World) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and output; the same where a collective works in place."""
        before, after = lengths(case.collective, case.length, world.size)
        sizes = before * case.dtype.itemsize, after * case.dtype.itemsize
        memory = self._memory[0], self._memory[-1]
        pair = [part[:size].view(case.dtype) for part, size in zip(memory, sizes, strict=True)]
        return pair[0], pair[1]


class InProcess(ABC):
    """A collective that this process runs.

    Args:
        name: What it is called.
        buffers: What it works on.
        world: The ranks.
        staging: How messages go; None where there is no choice.
    """

    checked = True
    """The result is that of the collective."""

    def __init__(
        self, name: str, buffers: Buffers, world: World, staging: str | None = None
    ) -> None:
        self.name = name
        self.placement = buffers.placement
        self._buffers = buffers
        self._world = world
        self._staging = staging
        self._call: Callable[[], Any] = lambda: None

    def staging_of(self, case: Case) -> str | None:
        return self._staging if self._staging and self.sends(case) else None

    def prepare(self, case: Case, check: bool) -> int | None:
        self._choose_staging()
        source, target = self._buffers.views(case, self._world)
        self._call, self._source = self.bind(case, source, target), source
        rank, size = self._world.rank, self._world.size
        fill(source, rank, size, case.op)
        self._call()
        wrong = None
        if check and self.checked:
            wrong = count_wrong(target, case.collective, rank, size, case.op)
        source.zero_()
        return wrong

    def time(self, calls: int, fresh: bool) -> float:
        self._choose_staging()
        settle = functools.partial(_settle, self._buffers.device)
        return seconds_of(
            self._call, calls, mpiddl.barrier, self._source if fresh else None, settle
        )

    def _choose_staging(self) -> None:
        if self._staging is not None:
            self._buffers.device.use_staging(self._world, self._staging)

    def sends(self, case: Case) -> bool:
        """Whether messages of this device's memory take part."""
        return self._world.size > 1

    @abstractmethod
    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        """What ``time`` calls."""


def _settle(device: Device) -> None:
    wait_for(device.settled())
