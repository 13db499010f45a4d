"""Every test that wants a GPU, on those of this node: `make test-gpu`.

    .venv/bin/python tools/test_gpu.py --ranks 1,2 --suites gpu -- -k races

Runs tests/gpu, then tests/ranks with all tensors on the GPU, for each number of ranks, which share
GPUs where there are fewer, and each way of GPU memory to MPI. Goes on after a failure, and exits 1
in the end. Without a GPU it says so and exits 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
MPIRUN = str(TOP / "tools" / "mpirun")
ASK = """
import mpiddl
from mpiddl.devices.cuda_aware.verdict import mpi_reads_gpu_memory
world = mpiddl.init(device="cuda")
print("staging:", "device" if mpi_reads_gpu_memory(world.device.index)(world) else "host")
"""
SUITES = {"gpu": ["tests/gpu"], "ranks": ["tests/ranks", "--device", "cuda"]}


def why_not() -> str:
    """Why there is nothing to do; empty if there is."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is missing; `make gpu-env`, or pip install 'mpiddl[cuda13]'"
    return ""


def run(ranks: int, program: list[str], staging: str, seconds: float) -> tuple[int, str]:
    """A job's exit status and, of a question, its answer; 124 if its time was up."""
    command = [MPIRUN, "-n", str(ranks), *program]
    environment = {**os.environ, "MPIDDL_STAGING": staging}
    asks = subprocess.PIPE if program[1] == "-c" else None
    process = subprocess.Popen(  # noqa: S603 - our own tests
        command, cwd=TOP, env=environment, stdout=asks, text=True
    )
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        return 124, ""
    return process.returncode, out or ""


def ways(wanted: str) -> list[str]:
    """Of GPU memory to MPI: those that were asked for, or all that work here."""
    if wanted != "all":
        return wanted.split(",")
    status, answer = run(1, ["python", "-c", ASK], "auto", 300)
    if status:
        print(f"no answer whether this MPI reads GPU memory (status {status}): staging host alone")
    elif "staging: host" in answer:
        print("this MPI does not read GPU memory: staging host alone")
    return ["host", "device"] if "staging: device" in answer else ["host"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks")
    parser.add_argument("--staging", default="all", help="all that work, or host,device")
    parser.add_argument("--suites", default="gpu,ranks", help="gpu: tests/gpu; ranks: tests/ranks")
    parser.add_argument("--seconds", type=float, default=1800, help="at most, of one run")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, behind --")
    chosen = parser.parse_args()
    if reason := why_not():
        print(f"test-gpu: skipped: {reason}")
        return
    rows = []
    for staging in ways(chosen.staging):
        for suite in chosen.suites.split(","):
            for ranks in map(int, chosen.ranks.split(",")):
                if ranks == 1 and staging != "host":
                    continue  # one rank sends no messages
                what = f"{suite} on {ranks} ranks, staging {staging}"
                print(f"\n== {what}", flush=True)
                began = time.monotonic()
                program = ["python", "-m", "pytest", "-q", *SUITES[suite], *chosen.pytest]
                status, _ = run(ranks, program, staging, chosen.seconds)
                word = {0: "passed", 5: "nothing to run", 124: "out of time"}.get(status, "FAILED")
                rows.append((word, what, time.monotonic() - began))
    print()
    for word, what, seconds in rows:
        print(f"{word:>14}  {what}  ({seconds:.0f} s)")
    sys.exit(any(word not in ("passed", "nothing to run") for word, _, _ in rows))


if __name__ == "__main__":
    main()
