"""All of docs/performance.md's all-reduce figures, measured again on this machine.

    python benchmarks/all_reduce.py                     # the MPIs that are installed
    sudo python benchmarks/all_reduce.py --lab          # also across hosts of benchmarks/lab

Runs `mpiddl bench all-reduce`, which says what it measures and how, once for each line of RUNS and
writes its JSON into benchmarks/results, with the commit. Tables: benchmarks/tables.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

HERE = Path(__file__).parent
MPIRUN = HERE.parent / "tools" / "mpirun"
MPIS = ("openmpi", "mpich", "intel", "system")


class Run(NamedTuple):
    """One `mpiddl bench`; ``lab`` are the lab's options, none: this machine alone."""

    name: str
    ranks: int
    flags: str
    lab: str = ""


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


def _check_output(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def _installed() -> list[str]:
    """By the files with which `make install MPI=...` remembers."""
    return [name for name in MPIS if (Path(sys.prefix) / f".{name}").exists()]


def _measure(mpi: str, run: Run, out: Path) -> None:
    file = out / f"all_reduce_{mpi}_{run.name}.json"
    bench = ["python", "-m", "mpiddl", "bench", "all-reduce", *run.flags.split()]
    command = [str(MPIRUN), "-n", str(run.ranks), *bench]
    if run.lab:
        lab = [sys.executable, str(HERE / "lab"), "--mpi", mpi, *run.lab.split()]
        command = [*lab, "--", *bench]
        goodput = json.loads(_check_output(*lab[:4], *_link(run.lab), "--tcp"))
    print(f"\n$ MPI={mpi} {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as cache:  # without what `mpiddl tune` found here
        environment = {**os.environ, "MPI": mpi, "XDG_CACHE_HOME": cache}
        subprocess.run([*command, "--json", str(file)], env=environment, check=True)
    report = json.loads(file.read_text())
    report["environment"]["command"] = " ".join(bench[2:])
    report["environment"]["commit"] = _check_output("git", "rev-parse", "--short", "HEAD").strip()
    if run.lab:
        report["environment"]["lab"] = run.lab
        report["environment"]["tcp_gbps"] = min(goodput["mb_per_second"].values()) / 1e3
    file.write_text(json.dumps(report, indent=1) + "\n")


def _link(options: str) -> list[str]:
    words = options.split()
    return words[words.index("--rate") :][:2]


def main(
    lab: Annotated[bool, typer.Option("--lab", help="Also across hosts; needs root.")] = False,
    mpi: Annotated[str, typer.Option(help="Comma-separated; default all installed.")] = "",
    only: Annotated[str, typer.Option(help="Runs whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of results.")] = HERE / "results",
) -> None:
    """Measure every run with every MPI."""
    names = mpi.split(",") if mpi else _installed()
    if unknown := set(names) - set(MPIS):
        raise typer.BadParameter(f"no MPI {', '.join(sorted(unknown))}; {', '.join(MPIS)}")
    out.mkdir(parents=True, exist_ok=True)
    for run in [*RUNS, *(LAB_RUNS if lab else [])]:
        for name in names:
            if only in run.name and not (run.lab and name == "system"):
                _measure(name, run, out)


if __name__ == "__main__":
    typer.run(main)
