"""All of docs/performance.md's all-reduce figures, measured again on this machine.

    python benchmarks/all_reduce.py                     # the MPIs that are installed
    sudo python benchmarks/all_reduce.py --lab          # also across hosts of benchmarks/lab
    python benchmarks/all_reduce.py --device cuda       # on this machine's GPUs; exits 2 without

Runs `mpiddl bench all-reduce`, which says what it measures and how, once for each line of RUNS and
writes its JSON into benchmarks/results, with the commit. Tables: benchmarks/tables.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from suite import HERE, Device, Run, count_gpus, measure_all

SMALL = "--sizes 64,1KiB,8KiB,64KiB --algorithms auto,library,gloo --repeats 31"
LARGE = "--sizes 256KiB:256MiB --algorithms auto,ring,library,gloo --repeats 15"
NETWORK = "--sizes 4MiB,16MiB --repeats 9 --warmup 1 --algorithms"
RUNS = [
    Run("2_ranks_small", 2, SMALL),
    Run("2_ranks_large", 2, LARGE),
    Run("2_ranks_fresh", 2, "--sizes 256KiB:64MiB --algorithms auto,library,gloo --fresh"),
    Run("2_ranks_16_bit", 2, "--sizes 64KiB:64MiB --algorithms auto --dtype float32,bfloat16"),
    Run("4_ranks", 4, "--sizes 1KiB:64MiB --algorithms auto,library,gloo"),
]
LAB_RUNS = [
    Run("2_hosts_1gbit", 2, f"{NETWORK} auto,library,gloo", "--hosts 2 --rate 1gbit"),
    Run("4_hosts_200mbit", 4, f"{NETWORK} auto,library,gloo", "--hosts 4 --rate 200mbit"),
    Run(
        "2x2_200mbit_cyclic",
        4,
        f"{NETWORK} auto,hierarchical,ring,library,gloo",
        "--hosts 2 --ranks-per-host 2 --placement cyclic --rate 200mbit",
    ),
]


GPU = "--sizes 4KiB:256MiB --repeats 15 --staging device,host --algorithms "
GPU += "auto,shared,hierarchical,ring,direct,doubling,nccl,library,sendrecv,gloo"


def gpu_runs(count: int) -> list[Run]:
    """For a machine with so many GPUs: each has its own, and two ranks share one."""
    shared = Run("2_ranks_one_gpu", 2, f"{GPU} --device cuda:0")
    return [Run("one_gpu_each", count, f"{GPU} --device cuda"), shared] if count > 1 else [shared]


def main(
    lab: Annotated[bool, typer.Option("--lab", help="Also across hosts; needs root.")] = False,
    device: Annotated[Device, typer.Option(help="Where buffers are.")] = Device.cpu,
    mpi: Annotated[str, typer.Option(help="Comma-separated; default all installed.")] = "",
    only: Annotated[str, typer.Option(help="Runs whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of results.")] = HERE / "results",
) -> None:
    """Measure every run with every MPI."""
    runs = [*RUNS, *(LAB_RUNS if lab else [])]
    if device is Device.cuda:
        runs = gpu_runs(count_gpus())
    measure_all("all-reduce", runs, mpi, only, out)


if __name__ == "__main__":
    typer.run(main)
