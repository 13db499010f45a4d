"""Time mpiddl's ring against the installed MPI's all-reduce, on the same ranks in the same run.

    tools/mpirun -n 2 python benchmarks/all_reduce.py --json benchmarks/results/all_reduce.json

``ring`` and ``library`` are mpiddl's (``library`` is MPI_Iallreduce, driven as everything in mpiddl
is); ``mpi`` is a plain blocking MPI_Allreduce through mpi4py. They take turns, so that a machine
that slows down slows all; every result is checked.
Definitions as in nccl-tests: algbw = bytes / time, busbw = algbw x 2(n-1)/n, GB = 1e9 bytes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import mpiddl
from mpiddl.cli.run import run
from mpiddl.measure.environment import rank_facts
from mpiddl.units import format_bytes, parse_bytes

ALGORITHMS = ("ring", "library", "mpi")


def seconds_of(algorithm: str, length: int, world: mpiddl.World) -> float:
    """One checked all-reduce between barriers; the slowest rank counts."""
    buffer = torch.full((length,), float(world.rank + 1))
    from mpi4py import MPI  # after mpiddl.init(), which starts it

    mpiddl.barrier()
    started = time.perf_counter()
    if algorithm == "mpi":
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, buffer.numpy())
    else:
        mpiddl.all_reduce(buffer, algorithm=algorithm)
    seconds = time.perf_counter() - started
    want = world.size * (world.size + 1) / 2
    if not torch.all(buffer == want):
        raise RuntimeError(f"{algorithm} is wrong on rank {world.rank}")
    return float(mpiddl.all_reduce(torch.tensor([seconds]), op="max"))


def environment(world: mpiddl.World) -> dict[str, object]:
    """What the numbers depend on."""
    facts = rank_facts(world)
    kept = {name: facts[name] for name in ("cpu", "node_cores", "cores", "versions", "place")}
    return {**kept, "mpi": facts["mpi"]["library"], "torch_threads": torch.get_num_threads()}


def _sizes(text: str) -> str:
    try:
        if min(parse_bytes(size) for size in text.split(",")) < 4:
            raise ValueError("sizes must be at least 4B, one float32")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def main(
    sizes: Annotated[str, typer.Option(callback=_sizes, help="Comma-separated.")] = (
        "1KiB,64KiB,1MiB,4MiB,16MiB,64MiB"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 15,
    results: Annotated[Path | None, typer.Option("--json", help="Write rows there.")] = None,
) -> None:
    """Print the median time and bandwidth of float32 sums, algorithms interleaved."""
    world = mpiddl.init()
    factor = 2 * (world.size - 1) / world.size
    rows = []
    for size in sizes.split(","):
        length = parse_bytes(size) // 4
        times: dict[str, list[float]] = {algorithm: [] for algorithm in ALGORITHMS}
        for algorithm in ALGORITHMS * (repeats + 2):
            times[algorithm].append(seconds_of(algorithm, length, world))
        for algorithm, seconds in times.items():
            median = statistics.median(seconds[2:])  # two to warm up
            rows.append(
                {
                    "collective": "all_reduce",
                    "algorithm": algorithm,
                    "nbytes": 4 * length,
                    "dtype": "float32",
                    "op": "sum",
                    "ranks": world.size,
                    "seconds": median,
                    "algbw": 4 * length / median / 1e9,
                    "busbw": 4 * length / median / 1e9 * factor,
                }
            )
            if world.rank == 0:
                print(
                    f"{format_bytes(4 * length):>8} {algorithm:>8} {median * 1e6:10.1f} us "
                    f"{rows[-1]['busbw']:6.2f} GB/s busbw",
                    flush=True,
                )
    if world.rank == 0 and results is not None:
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["benchmarks/all_reduce.py", *sys.argv[1:]]),
            "environment": environment(world),
            "rows": rows,
        }
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
