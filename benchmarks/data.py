"""docs/data.md's figures: sharding, moving, node-shared reads, balancing.

    python benchmarks/data.py                       # all of it, into benchmarks/results
    python benchmarks/data.py --only moving         # a part; nothing is written

Each part is a job of its own. Candidates take turns in every round; medians count.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from suite import HERE, MPIRUN

import mpiddl

LENGTH = 100_000_000
KINDS = ("contiguous", "strided", "random", "hash")
ROWS = (3 << 10, 150 << 10)
MOVED_BYTES = 192 << 20
READ_BYTES = 1 << 30
ROUNDS = 9


def peak_bytes() -> int:
    """Of memory that this process had in it since ``forget_peak``."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) << 10


def forget_peak() -> int:
    """From now on; what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def slowest(world: mpiddl.World, work: Callable[[], Any]) -> float:
    """Seconds from a common start until all ranks are through."""
    mpiddl.barrier()
    started = time.perf_counter()
    work()
    return max(mpiddl.gather_json(time.perf_counter() - started, world=world))


def random_turns(names: list[str]) -> Iterator[list[str]]:
    """Another order each round, the same on all ranks: nobody always finds a neighbour's cache."""
    random = numpy.random.default_rng(0)
    while True:
        yield [names[at] for at in random.permutation(len(names))]


def sharding(world: mpiddl.World) -> list[dict[str, Any]]:
    """Indices of this rank, as an array: seconds, and peak memory against that of the array."""
    rows = []
    for kind in KINDS:
        seconds, memory = [], []
        for epoch in range(5):
            before = forget_peak()
            indices: list[Any] = []

            def work(kind: str = kind, epoch: int = epoch, found: list[Any] = indices) -> None:
                shard = mpiddl.data.shard(kind, LENGTH, seed=1, epoch=epoch)
                if isinstance(shard, range):
                    shard = numpy.arange(shard.start, shard.stop, shard.step)
                found.append(shard)

            seconds.append(slowest(world, work))
            memory.append((peak_bytes() - before) / indices[0].nbytes)
            indices.clear()  # or the next one's peak would be this one's
        rows.append(
            {
                "kind": kind,
                "length": LENGTH,
                "ranks": world.size,
                "seconds": statistics.median(seconds),
                "memory_ratio": max(mpiddl.gather_json(statistics.median(memory))),
            }
        )
    return rows


def moving(world: mpiddl.World) -> list[dict[str, Any]]:
    """Scatter and shuffle against MPI_Alltoall; the same bytes on each rank, memory in use before.

    ``scatter`` moves from one rank what ``alltoall`` moves from all: it is held against one of the
    bytes that leave the root.
    """
    from mpi4py import MPI

    rows = []
    for row_bytes in ROWS:
        count = MOVED_BYTES // row_bytes // world.size * world.size
        random = numpy.random.default_rng(world.rank)
        samples = random.integers(0, 255, (count, row_bytes), dtype=numpy.uint8)
        received = numpy.zeros_like(samples)
        scattered = samples[: count // world.size].copy()
        small = samples[: count // world.size]
        candidates = {
            "alltoall": lambda a=samples, b=received: MPI.COMM_WORLD.Alltoall(a, b),
            "gather": functools.partial(  # random samples of one's own: what order alone costs
                numpy.take, samples, random.permutation(count), axis=0, out=received, mode="clip"
            ),
            "shuffler": functools.partial(mpiddl.data.Shuffler(samples).epoch, 1),
            "shuffle": lambda a=samples, b=received: mpiddl.data.shuffle(a, out=b),
            "alltoall/n": lambda a=small, b=scattered: MPI.COMM_WORLD.Alltoall(a, b),
            "scatter": lambda a=samples, b=scattered: mpiddl.data.scatter(
                a if world.rank == 0 else None, out=b
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in candidates}
        turns = random_turns(list(candidates))
        for number in range(ROUNDS + 1):
            for name in next(turns):
                seconds = slowest(world, candidates[name])
                if number:
                    times[name].append(seconds)
        medians = {name: statistics.median(each) for name, each in times.items()}
        rows.append(
            {
                "row_bytes": row_bytes,
                "nbytes": samples.nbytes,
                "ranks": world.size,
                **{f"{name}_ms": seconds * 1e3 for name, seconds in medians.items()},
                "shuffler_ratio": medians["alltoall"] / medians["shuffler"],
                "shuffle_ratio": medians["alltoall"] / medians["shuffle"],
                "scatter_ratio": medians["alltoall/n"] / medians["scatter"],
            }
        )
    return rows


def reads(world: mpiddl.World) -> list[dict[str, Any]]:
    """Random samples of a node-shared data set against those of a private tensor; by pairs."""
    rows = []
    for row_bytes in ROWS:
        private = torch.arange(READ_BYTES // row_bytes * row_bytes // 8).view(-1, row_bytes // 8)
        plain = torch.utils.data.TensorDataset(private)
        with mpiddl.data.NodeSharedDataset(private if world.local_rank == 0 else None) as shared:
            random = numpy.random.default_rng(world.rank)
            count = max(64, min((64 << 20) // row_bytes, 20_000))
            for tensor in (private, shared.arrays[0]):  # the first touch of a page counts nowhere
                tensor.view(-1)[::512].sum()
            times: dict[str, list[float]] = {"shared": [], "private": []}
            for number in range(2 * ROUNDS):
                turns = [("shared", shared), ("private", plain)]
                for name, dataset in turns if number % 2 else turns[::-1]:
                    order = random.integers(0, len(plain), count).tolist()
                    mpiddl.barrier()
                    times[name].append(seconds_of_reads(dataset, order))
        pairs = zip(times["shared"], times["private"], strict=True)
        mine = {
            "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
            **{f"{name}_us": statistics.median(t) / count * 1e6 for name, t in times.items()},
        }
        everyones = mpiddl.gather_json(mine)
        worst = max(everyones, key=lambda row: row["ratio"])
        rows.append(
            {"row_bytes": row_bytes, "nbytes": private.nbytes, "ranks": world.size, **worst}
        )
    return rows


def seconds_of_reads(dataset: Any, order: Sequence[int]) -> float:
    """One sample after the other, every byte."""
    started = time.perf_counter()
    for index in order:
        dataset[index][0].sum()
    return time.perf_counter() - started


def balancing(world: mpiddl.World) -> list[dict[str, Any]]:
    """Rank 0 computes everything three times: what balancing wins of what could be won.

    Ideal: both compute equally long; what a step costs besides computing stays.
    """
    torch.manual_seed(0)
    batch, steps = 1024, 30
    inputs, targets = torch.randn(batch * steps, 512), torch.randn(batch * steps, 1)
    layers = [module for _ in range(4) for module in (torch.nn.Linear(512, 512), torch.nn.ReLU())]
    model = mpiddl.DataParallel(torch.nn.Sequential(*layers, torch.nn.Linear(512, 1)))
    extra = copy.deepcopy(model.module)
    batches = mpiddl.ShardBatchSampler(batch * steps, world, batch_size=batch)
    balancer = mpiddl.data.Balancer(batches, model)

    def epoch(number: int, every: int) -> float:
        batches.set_epoch(number)
        mpiddl.barrier()
        started = time.perf_counter()
        for step, part in enumerate(batches):
            x, y = inputs[part], targets[part]
            model.zero_grad()
            with model.batch(local=len(part), total=batches.total):
                torch.nn.functional.mse_loss(model(x), y).backward()
            for _ in range(2 if world.rank == 0 else 0):
                torch.nn.functional.mse_loss(extra(x), y).backward()
            balancer.step()
            if every and step % every == every - 1:
                balancer.rebalance()
        return max(mpiddl.gather_json(time.perf_counter() - started)) / steps

    for number in range(4):
        epoch(number, 10)
    learned = batches.shares_at(batches.drawn)
    even, balanced, busy = [], [], []
    for number in range(4, 4 + 2 * ROUNDS):
        shares, seconds = [([1.0] * world.size, even), (learned, balanced)][number % 2]
        batches.set_shares(shares, batches.drawn)
        seconds.append(epoch(number, 0))
        balancer.rebalance()
        if seconds is even:
            busy.append(balancer.rounds[-1]["seconds"])
    compute = numpy.median(busy, axis=0)
    medians = {"even": statistics.median(even), "balanced": statistics.median(balanced)}
    samples = batch / world.size
    ideal = batch / (samples / compute).sum() + medians["even"] - compute.max()
    return [
        {
            "ranks": world.size,
            **{f"{name}_ms": seconds * 1e3 for name, seconds in medians.items()},
            "ideal_ms": ideal * 1e3,
            "shares": learned,
            "speed_up": medians["even"] / medians["balanced"],
            "ideal_speed_up": medians["even"] / ideal,
            "recovered": (medians["even"] / medians["balanced"] - 1)
            / (medians["even"] / ideal - 1),
        }
    ]


PARTS: dict[str, tuple[int, Callable[[mpiddl.World], list[dict[str, Any]]]]] = {
    "sharding": (4, sharding),
    "moving": (2, moving),
    "reads": (2, reads),
    "balancing": (2, balancing),
}


def run_part(name: str, out: Path) -> None:
    """On every rank."""
    from mpiddl.doctor.environment import environment_of

    torch.set_num_threads(1)
    world = mpiddl.init(device="cpu")
    rows = PARTS[name][1](world)
    environment = environment_of(world)
    if world.rank == 0:
        for row in rows:
            print(json.dumps(row), flush=True)
        out.write_text(json.dumps({"rows": rows, "environment": environment}))


def main(
    mpi: Annotated[str, typer.Option(help="Which MPI starts the ranks.")] = "openmpi",
    only: Annotated[str, typer.Option(help="One of sharding, moving, reads, balancing.")] = "",
    part: Annotated[str, typer.Option(hidden=True)] = "",
    out: Annotated[Path, typer.Option(hidden=True)] = HERE / "results",
) -> None:
    """Measure it all."""
    if part:
        run_part(part, out)
        return
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [only] if only else PARTS:
            file = Path(folder) / f"{name}.json"
            program = [sys.executable, __file__, "--part", name, "--out", str(file)]
            command = [str(MPIRUN), "-n", str(PARTS[name][0]), *program]
            print(f"\n$ MPI={mpi} python benchmarks/data.py --only {name}", flush=True)
            subprocess.run(command, env={**os.environ, "MPI": mpi}, check=True)
            report[name] = json.loads(file.read_text())
    if not only:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], check=True, text=True, stdout=subprocess.PIPE
        )
        report["commit"] = commit.stdout.strip()
        (out / f"data_{mpi}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
