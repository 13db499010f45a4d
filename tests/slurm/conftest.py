"""The scripts that users submit, in the Slurm of tools/slurm_lab: `make test-slurm`."""

from __future__ import annotations

import os
import subprocess

import pytest
from batch import SCRIPTS, TOP, Job, call, environment

# Without torch, whose import takes longer than all the rest.
PROGRAM = """
import os, sys, mpiddl
from mpi4py import MPI
world = mpiddl.init()
gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
threads = os.environ["OMP_NUM_THREADS"]
print("rank", world.rank, "of", world.size, "on", world.hostname, "gpus", gpus, flush=True)
MPI.COMM_WORLD.Barrier()
if world.rank == 0:
    print("local", world.local_rank, "threads", threads, "arguments", sys.argv[1:], flush=True)
if "raise" in sys.argv and world.rank == 1:
    raise KeyError("the cause")
MPI.COMM_WORLD.Barrier()
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="session")
def slurm():
    """Nothing but that there is one."""
    if "SLURM_LAB_LOGS" not in os.environ:
        pytest.skip("not in a lab: `make test-slurm` starts one, with root and Debian's packages")


@pytest.fixture
def program(tmp_path):
    """Tells who its ranks are; with ``raise`` among its arguments rank 1 fails."""
    path = tmp_path / "a program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def submit(slurm, tmp_path):
    """``submit("multi_node", options, arguments)`` puts a script into the queue as it is.

    Jobs run in a folder of their own, with a core for each rank unless ``options`` say more. What
    is left of them at the end of a test is cancelled.
    """
    jobs = []
    (tmp_path / "jobs").symlink_to(TOP / "jobs")

    def put(name, options=(), arguments=(), *, env=None):
        script = SCRIPTS / f"{name}.sbatch"
        flags = ["--parsable", f"--chdir={tmp_path}", "--cpus-per-task=1", *options]
        sbatch = subprocess.run(
            ["sbatch", *flags, script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment() | (env or {}),
            check=False,
        )
        assert sbatch.returncode == 0, sbatch.stderr
        jobs.append(Job(sbatch.stdout.strip()))
        return jobs[-1]

    yield put
    for job in jobs:
        call("scancel", job.number)


@pytest.fixture
def run(submit):
    """Submit, and wait until it has succeeded; returns what it wrote."""

    def wait(*arguments, **settings):
        job = submit(*arguments, **settings)
        assert job.until_over() == "COMPLETED", job.output
        return job.output

    return wait
