"""All of docs/performance.md's all-reduce figures, measured again on this machine.

    python benchmarks/all_reduce.py                     # the MPIs that are installed
    sudo python benchmarks/all_reduce.py --lab          # also across hosts of benchmarks/lab

Runs `mpiddl bench all-reduce`, which says what it measures and how, once for each line of RUNS and
writes its JSON into benchmarks/results, with the commit. Tables: benchmarks/tables.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from suite import HERE, Run, measure_all

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


def main(
    lab: Annotated[bool, typer.Option("--lab", help="Also across hosts; needs root.")] = False,
    mpi: Annotated[str, typer.Option(help="Comma-separated; default all installed.")] = "",
    only: Annotated[str, typer.Option(help="Runs whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of results.")] = HERE / "results",
) -> None:
    """Measure every run with every MPI."""
    measure_all("all-reduce", [*RUNS, *(LAB_RUNS if lab else [])], mpi, only, out)


if __name__ == "__main__":
    typer.run(main)
