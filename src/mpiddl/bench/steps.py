"""Training steps and what they cost, the same for every way to exchange gradients.

Knows nothing of MPI: processes of other libraries train with it, too.
"""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpiddl.bench.models import ModelSpec, batches, build, loss_of
from mpiddl.bench.timing import nothing

__all__ = ["Cost", "Training", "Way", "fingerprint", "keep_memory", "sgd"]

NUM_BATCHES = 4
LEARNING_RATE = 0.01
PRINTS = 1024
"""Numbers in a fingerprint."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class Cost(NamedTuple):
    """Of one step, in seconds.

    Attributes:
        wall: Time that passed.
        cpu: Processor time of this process, all its threads, kernel included.
        system: The kernel's part of that.
        beside: The part of ``cpu`` that threads beside the training one took.
    """

    wall: float
    cpu: float
    system: float
    beside: float


@dataclass
class Way:
    """One way to train.

    Attributes:
        model: What forward calls.
        optimizer: Has ``zero_grad()`` and ``step()``.
        exchange: Called between backward and step.
        settle: Called after a block of steps: leaves nothing in flight.
    """

    model: nn.Module
    optimizer: Any
    exchange: Callable[[], object] = nothing
    settle: Callable[[], object] = nothing


class Training:
    """A model that is trained on batches of this rank.

    On a GPU a step ends when the caller's stream has done all that it was asked.

    Args:
        spec: The model.
        rank: Decides the data.
        make_way: Makes the way to train the model that it is given.
        barrier: Returns once all processes are here.
        device: Where the model is.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rank: int,
        make_way: Callable[[nn.Module], Way],
        barrier: Callable[[], object],
        device: str = "cpu",
    ) -> None:
        keep_memory()
        on_gpu = torch.device(device).type == "cuda"
        self._spec = spec
        self._batches = batches(spec, rank, NUM_BATCHES, device)
        self._model = build(spec).to(device)
        self._end = torch.cuda.current_stream(device).synchronize if on_gpu else nothing
        self._before = fingerprint(self._model.parameters())
        self._way = make_way(self._model)
        self._barrier = barrier
        self._steps_done = 0

    def run(self, steps: int) -> Cost:
        """What one of ``steps`` steps costs, after one that is not counted: caches and threads
        still belong to whoever trained before."""
        self._barrier()
        self._step()
        before = _clocks()
        for _ in range(steps):
            self._step()
        after = _clocks()
        self._way.settle()
        spent = (late - early for early, late in zip(before, after, strict=True))
        return Cost(*(seconds / max(1, steps) for seconds in spent))

    def _step(self) -> None:
        way = self._way
        inputs, targets = self._batches[self._steps_done % NUM_BATCHES]
        way.optimizer.zero_grad()
        loss_of(self._spec, way.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        way.exchange()
        way.optimizer.step()
        self._end()
        self._steps_done += 1

    def changes(self) -> list[float]:
        """A fingerprint of what training has changed."""
        self._way.settle()
        now = fingerprint(self._model.parameters())
        changed: list[float] = (now - self._before).tolist()
        return changed


def keep_memory() -> None:
    """Let this process keep memory that it has freed.

    glibc gives large blocks back to the kernel or keeps them, depending on what lies next to them.
    Gradients of the same model then cost page faults in one candidate and none in the next: up to
    a quarter of a step, which is nobody's communication.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every candidate."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def fingerprint(parameters: Iterable[Tensor]) -> Tensor:
    """A few numbers in place of millions: sums of elements with random signs, in float64.

    Linear, so the difference of two is the fingerprint of the difference; and its norm is about
    that of all elements (a count sketch), so no element can differ unseen.
    """
    random = torch.Generator().manual_seed(0)
    prints = torch.zeros(PRINTS, dtype=torch.float64)
    for parameter in parameters:
        elements = parameter.detach().cpu().flatten().double()
        signs = torch.randint(2, elements.shape, generator=random, dtype=torch.int8) * 2 - 1
        padded = nn.functional.pad(elements * signs, (0, -len(elements) % PRINTS))
        prints += padded.view(-1, PRINTS).sum(0)
    return prints


def _clocks() -> Cost:
    cpu = time.process_time()
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    return Cost(time.perf_counter(), cpu, system, cpu - time.thread_time())
