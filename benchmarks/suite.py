"""Runs `mpiddl bench` once for each line of a list and writes its JSON, with the commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch
import typer

__all__ = ["HERE", "Device", "Run", "count_gpus", "measure_all"]

HERE = Path(__file__).parent
MPIRUN = HERE.parent / "tools" / "mpirun"
MPIS = ("openmpi", "mpich", "intel", "system")


class Device(str, Enum):
    """Of buffers and models."""

    cpu = "cpu"
    cuda = "cuda"


def count_gpus() -> int:
    """Those that torch sees.

    Raises:
        typer.Exit: None; status 2, for nothing measured is no success.
    """
    if not torch.cuda.is_available():
        typer.echo("torch sees no GPU here: nothing was measured (docs/gpu.md)", err=True)
        raise typer.Exit(2)
    return torch.cuda.device_count()


class Run(NamedTuple):
    """One `mpiddl bench`; ``lab`` are the lab's options, none: this machine alone."""

    name: str
    ranks: int
    flags: str
    lab: str = ""


def measure_all(
    bench: str,
    runs: Sequence[Run],
    mpi: str,
    only: str,
    out: Path,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Every run whose name contains ``only``, with every MPI.

    Args:
        bench: Which `mpiddl bench`.
        runs: What to run.
        mpi: Comma-separated; empty: all that are installed.
        only: Part of a name.
        out: Folder of results.
        settings: Environment variables.
    """
    names = mpi.split(",") if mpi else _installed()
    if unknown := set(names) - set(MPIS):
        raise typer.BadParameter(f"no MPI {', '.join(sorted(unknown))}; {', '.join(MPIS)}")
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        for name in names:
            if only in run.name and not (run.lab and name == "system"):
                file = out / f"{bench.replace('-', '_')}_{name}_{run.name}.json"
                _measure(bench, name, run, file, settings or {})


def _check_output(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def _installed() -> list[str]:
    """By the files with which `make install MPI=...` remembers."""
    return [name for name in MPIS if (Path(sys.prefix) / f".{name}").exists()]


def _measure(bench: str, mpi: str, run: Run, file: Path, settings: Mapping[str, str]) -> None:
    program = ["python", "-m", "mpiddl", "bench", bench, *run.flags.split()]
    command = [str(MPIRUN), "-n", str(run.ranks), *program]
    if run.lab:
        lab = [sys.executable, str(HERE / "lab"), "--mpi", mpi, *run.lab.split()]
        command = [*lab, "--", *program]
        goodput = json.loads(_check_output(*lab[:4], *_link(run.lab), "--tcp"))
    print(f"\n$ MPI={mpi} {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as cache:  # without what `mpiddl tune` found here
        environment = {**os.environ, **settings, "MPI": mpi, "XDG_CACHE_HOME": cache}
        subprocess.run([*command, "--json", str(file)], env=environment, check=True)
    report = json.loads(file.read_text())
    report["environment"]["command"] = " ".join(program[2:])
    report["environment"]["commit"] = _check_output("git", "rev-parse", "--short", "HEAD").strip()
    if run.lab:
        report["environment"]["lab"] = run.lab
        report["environment"]["tcp_gbps"] = min(goodput["mb_per_second"].values()) / 1e3
    file.write_text(json.dumps(report, indent=1) + "\n")


def _link(options: str) -> list[str]:
    words = options.split()
    return words[words.index("--rate") :][:2]
