"""Scripts that start ranks: they are ranks of one job, on the nodes that were asked for."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from batch import DIGITS, SCRIPTS, Job, call, environment

ODD = ["two words", "$HOME", "*", "it's", '"quoted"', ";", ""]


def ranks_in(output):
    """(rank, world size, host), sorted."""
    found = re.findall(r"^rank (\d+) of (\d+) on (\S+)", output, re.M)
    return sorted((int(rank), int(size), host) for rank, size, host in found)


def block(size, per_node):
    return [(rank, size, f"host{rank // per_node + 1}") for rank in range(size)]


@pytest.mark.parametrize(
    ("script", "ranks"),
    [("multi_node", 2), ("mpirun_in_sbatch", 2), ("mpich_pmi2", 2)],
)
def test_ranks_are_where_they_belong(run, program, script, ranks):
    output = run(script, [f"--ntasks-per-node={ranks}"], [program, *ODD])

    assert ranks_in(output) == block(2 * ranks, ranks), output
    assert f"arguments {ODD}" in output


def test_a_rank_has_the_threads_that_were_asked_for(run, program):
    output = run("single_node", ["--ntasks-per-node=1", "--cpus-per-task=2"], [program])

    assert "threads 2" in output


def test_without_arguments_it_trains_the_digits(submit, tmp_path):
    job = submit("single_node", ["--ntasks-per-node=1"])

    job.until_it_says("epoch   1/20")
    assert (tmp_path / "runs" / f"single-node-{job.number}" / "checkpoints").is_dir()


def test_gpus_of_a_node_are_seen_by_all_its_ranks(run, program):
    """The lab's GPUs are names only. Bound ones would be 0 for one rank and 1 for the other."""
    output = run("gpu_nodes", ["--ntasks-per-node=2", "--gpus-per-node=2"], [program])

    assert ranks_in(output) == block(4, 2), output
    assert len(set(re.findall(r"gpus (\S+)", output))) == 1, output
    assert not re.search(r"gpus \d$", output, re.M), output


def test_ranks_and_gpus_must_be_as_many(submit, program):
    job = submit("gpu_nodes", ["--ntasks-per-node=1", "--gpus-per-node=2"], [program])

    assert job.until_over() == "FAILED"
    assert "1 ranks for 2 GPUs a node: make them equal" in job.output


def test_an_array_trains_with_each_rate(submit, tmp_path):
    options = ["--array=0-1", "--ntasks-per-node=1"]
    array = submit("array", options, [DIGITS, "--epochs", 1], env={"RATES": "1e-3 1e-1"})

    tasks = [Job(f"{array.number}_{index}") for index in (0, 1)]
    for task in tasks:
        assert task.until_over() == "COMPLETED", task.output
    folder = tmp_path / "runs" / f"array-{array.number}"
    losses = [
        json.loads((folder / f"lr-{rate}/metrics.jsonl").read_text())["loss"]
        for rate in ("1e-3", "1e-1")
    ]
    assert losses[0] != losses[1]


def test_an_index_without_a_rate(submit):
    array = submit("array", ["--array=7", "--ntasks-per-node=1"])

    task = Job(f"{array.number}_7")
    assert task.until_over() == "FAILED"
    assert "an index for which there is no rate" in task.output


def test_singletons_are_refused(slurm, program):
    """srun with the wrong PMI starts every rank as a job of its own."""
    python = environment()["VENV"] + "/bin/python"
    done = subprocess.run(
        ["srun", "--mpi=none", "--nodes=2", "--ntasks=2", python, program],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.returncode != 0
    assert "srun --mpi=pmix -n 2 python" in done.stderr
    assert "rank 0 of 1" not in done.stdout


FENCES = """
import time, mpiddl
from mpi4py import MPI
from mpiddl.launch import pmix
calls, fence = [], pmix.fence
pmix.fence = lambda: calls.append(fence())
mpiddl.init()
comm, word = MPI.COMM_WORLD, bytearray(1)
if comm.rank == 0:
    fence()
    comm.Send(word, 1)
else:
    request = comm.Irecv(word, 0)
    stays_out_until = time.monotonic() + 0.5
    while not (early := request.Test()) and time.monotonic() < stays_out_until:
        time.sleep(0.01)
    fence()
    request.Wait()
    print("fences of init", calls, "waits", not early)
"""


def test_init_waits_for_all_ranks_before_its_first_message(slurm, tmp_path):
    """Open MPI leaves that to a fence without data, and Slurm 22.05's does not wait."""
    program = tmp_path / "fences.py"
    program.write_text(FENCES)
    python = environment()["VENV"] + "/bin/python"

    output = call("srun", "--mpi=pmix", "--nodes=2", "--ntasks=2", python, program)

    assert output.splitlines()[-1] == "fences of init [True] waits True"


def test_every_script_fits_this_slurm(slurm):
    """The directives alone; a job of that size may have to wait."""
    for script in SCRIPTS.glob("*.sbatch"):
        size = ["--ntasks-per-node=1", "--cpus-per-task=1"]
        gpus = ["--gpus-per-node=1"] if script.stem == "gpu_nodes" else []
        call("sbatch", "--test-only", *size, *gpus, script)
