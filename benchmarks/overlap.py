"""All of docs/performance.md's training figures, measured again on this machine.

    python benchmarks/overlap.py                        # the MPIs that are installed
    sudo python benchmarks/overlap.py --lab             # also across hosts of benchmarks/lab
    python benchmarks/overlap.py --device cuda          # on this machine's GPUs; exits 2 without

Runs `mpiddl bench overlap` with one thread a rank, once for each line of RUNS, and writes its JSON
into benchmarks/results, with the commit. Tables: benchmarks/tables.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from suite import HERE, Device, Run, count_gpus, measure_all

NETWORK = (
    "--model mlp --width 1024 --layers 16 --steps 2 --warmup 3 "
    "--candidates after,mpiddl,next,ddp --engine inline,thread"
)
FEWER = "--candidates after,mpiddl,ddp --engine inline,after,auto"
RUNS = [
    Run("2_ranks", 2, "--repeats 25"),
    Run("2_ranks_longer", 2, f"--repeats 50 {FEWER}"),
]
LAB_RUNS = [
    Run("2_hosts_1gbit_batch_2048", 2, f"{NETWORK} --batch 2048 --repeats 6", "--rate 1gbit"),
    Run("2_hosts_1gbit_batch_512", 2, f"{NETWORK} --batch 512 --repeats 9", "--rate 1gbit"),
    Run("2_hosts_500mbit_batch_512", 2, f"{NETWORK} --batch 512 --repeats 9", "--rate 500mbit"),
]


def gpu_runs(count: int) -> list[Run]:
    """For a machine with so many GPUs: each has its own, two ranks share one, and one is alone."""
    flags = "--engine inline,thread --repeats 15 --candidates after,mpiddl,next,ddp"
    shared = Run("2_ranks_one_gpu", 2, f"{flags} --device cuda:0")
    alone = Run("1_rank_one_gpu", 1, "--candidates mpiddl --repeats 25 --device cuda:0")
    each = Run("one_gpu_each", count, f"{flags},ddp/nccl --device cuda")
    return [shared, alone, *([each] if count > 1 else [])]


def main(
    lab: Annotated[bool, typer.Option("--lab", help="Also across hosts; needs root.")] = False,
    device: Annotated[Device, typer.Option(help="Where models are.")] = Device.cpu,
    mpi: Annotated[str, typer.Option(help="Comma-separated; default all installed.")] = "",
    only: Annotated[str, typer.Option(help="Runs whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of results.")] = HERE / "results",
) -> None:
    """Measure every run with every MPI."""
    runs = [*RUNS, *(LAB_RUNS if lab else [])]
    if device is Device.cuda:
        runs = gpu_runs(count_gpus())
    measure_all("overlap", runs, mpi, only, out, {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    typer.run(main)
