"""Which all-reduce is fastest for which size, on these ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mpiddl.api.all_reduce import all_reduce
from mpiddl.api.call import new_channel, run
from mpiddl.base.units import format_bytes
from mpiddl.bench.bandwidth import Plan, Row, measure
from mpiddl.bench.candidates import Buffers, Candidate, Case, InProcess
from mpiddl.bench.memory import check_room
from mpiddl.collectives.choose import ALGORITHMS, choose, chunk_bytes_for
from mpiddl.collectives.node.lanes import foreground_of
from mpiddl.collectives.reduction import Reduction
from mpiddl.comm.tuning import Choice
from mpiddl.comm.world import World
from mpiddl.errors import UnsupportedBufferError

__all__ = ["choices_of", "tune"]

CHUNKED = ("ring", "hierarchical")
CHUNK_BYTES = (128 << 10, 512 << 10, 2 << 20)
GPU_CHUNK_BYTES = (1 << 20, 4 << 20, 16 << 20)
LEFT_OUT = ("library", "nccl", "reference")
"""Ordered, or only there to compare with."""
CLEARLY = 1.1
"""A choice changes from size to size only for a gain of more than this."""


class _Way(InProcess):
    """An algorithm with a chunk size."""

    def __init__(self, algorithm: str, chunk_bytes: int, buffers: Buffers, world: World) -> None:
        super().__init__(f"{algorithm}/{chunk_bytes}", buffers, world)
        self.algorithm, self.chunk_bytes = algorithm, chunk_bytes

    def bind(self, case: Case, source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
        algorithm, world, device = ALGORITHMS[self.algorithm], self._world, self._buffers.device
        if algorithm.one_node and algorithm.lanes:  # by the short way, as auto would
            return lambda: all_reduce(source, world=world)
        lanes = foreground_of(world) if algorithm.lanes else None

        def call() -> None:
            channel = new_channel(world, lanes)
            waits = algorithm.run(source, Reduction("sum"), channel, device, self.chunk_bytes)
            run(world, waits, device)

        return call


def tune(world: World, sizes: Sequence[int], repeats: int) -> Iterator[Row]:
    """A row for every size, algorithm and chunk size, in ``mpiddl.empty`` memory where there is
    some, on ``world.device``. Collective; the same rows on every rank.
    """
    world.tuned = []  # auto goes by the rules while it is measured
    check_room(2 * max(sizes), f"all-reduce of {format_bytes(max(sizes))}", world)
    placements = [Buffers(place, "all-reduce", max(sizes), world) for place in ("empty", "plain")]
    buffers = next(buffers for buffers in placements if buffers.usable)
    ways: list[Candidate] = []
    device, mapped = buffers.device, buffers.mapped
    several = GPU_CHUNK_BYTES if device.late else CHUNK_BYTES
    for name in ALGORITHMS:
        try:
            choose(name, torch.float32, 1, world, device=device, mapped=mapped)
        except UnsupportedBufferError:
            continue
        # On one node hierarchical is shared, without its short way for small buffers.
        if name not in LEFT_OUT and not (name == "hierarchical" and world.num_nodes == 1):
            chunks = several if name in CHUNKED else (chunk_bytes_for(device, world),)
            ways += [_Way(name, chunk_bytes, buffers, world) for chunk_bytes in chunks]
    for nbytes in sorted(sizes):
        case = Case("all-reduce", nbytes // 4 * 4, torch.float32, "sum")
        for row in measure(case, ways, world, Plan(repeats, warmup=2, check=False)):
            if isinstance(row, Row):
                yield row


def choices_of(rows: Sequence[Row]) -> list[Choice]:
    """The fastest way for each size; between two sizes the border is their geometric mean."""
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row.nbytes, {})[row.algorithm] = row.seconds
    sizes = sorted(times)
    best = [min(times[nbytes], key=times[nbytes].__getitem__) for nbytes in sizes]
    for place in range(1, len(sizes)):
        here = times[sizes[place]]
        if here[best[place - 1]] < here[best[place]] * CLEARLY:
            best[place] = best[place - 1]
    choices: list[Choice] = []
    for place, name in enumerate(best):
        last = place == len(best) - 1
        if last or best[place + 1] != name:
            border = None if last else math.isqrt(sizes[place] * sizes[place + 1])
            algorithm, chunk_bytes = name.split("/")
            choices.append(Choice(border, algorithm, int(chunk_bytes)))
    return choices
