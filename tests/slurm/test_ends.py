"""Jobs that end before they are through: preempted, cancelled, failed."""

from __future__ import annotations

import json
import re

import psutil
import pytest
from batch import DIGITS, call

EPOCHS = 8
RANKS = ["--ntasks-per-node=1"]
GONE_SECONDS = 10.0


def digits(out, *flags):
    return [DIGITS, "--epochs", EPOCHS, "--out", out, *flags]


def learned(out):
    """What training has made of the data, without what depends on the machine."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["epoch"], row["step"], row["loss"], row["test_accuracy"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed():
    """Filled by the first test that has a job of its own for it."""
    return {}


def test_training_on_two_nodes(run, tmp_path, undisturbed):
    run("multi_node", RANKS, digits(tmp_path / "out"))

    undisturbed["learned"] = learned(tmp_path / "out")
    assert len(undisturbed["learned"]) == EPOCHS


def preempted_by_hand(job):
    job.signal("USR1")


def preempted_by_urgent_jobs(job):
    """They need all cores. Slurm sends the --signal of the job in their way, and gives it time."""
    call(
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--ntasks=4",
        "--output=/dev/null",
        "--wrap=true",
    )


@pytest.mark.parametrize("preempt", [preempted_by_hand, preempted_by_urgent_jobs])
def test_a_preempted_job_goes_on_where_it_was(submit, tmp_path, undisturbed, preempt):
    out = tmp_path / "out"
    job = submit("preemptible", RANKS, digits(out))
    job.until_it_says("epoch   1/")
    preempt(job)
    assert job.until_over() == "COMPLETED", job.output

    saved = re.search(r"SIGUSR1: saved after step (\d+)", job.output)
    assert saved, job.output
    assert f"goes on after step {saved.group(1)}, " in job.output
    assert job.restarts == 1
    assert job.output.count("epoch   1/") == 1
    # No sample was left out, and none was seen twice.
    assert learned(out) == undisturbed["learned"], job.output


def test_a_signal_before_the_program_is_ready(submit, tmp_path):
    """It kills the ranks. The job may be started again, but here only once."""
    job = submit("preemptible", RANKS, digits(tmp_path / "out"), env={"MOST_RESTARTS": "0"})
    job.until(lambda: ranks_of(tmp_path), "ranks")
    job.signal("USR1")

    assert job.until_over() == "FAILED"
    assert "MOST_RESTARTS is 0: giving up" in job.output
    assert job.restarts == 0


@pytest.mark.parametrize("script", ["multi_node", "preemptible"])
def test_a_rank_that_raises_fails_the_job(submit, program, script):
    """And is no reason to start it again."""
    job = submit(script, RANKS, [program, "raise"])

    assert job.until_over() == "FAILED"
    assert "mpiddl: rank 1 of 2 on host2 failed" in job.output
    assert "KeyError: 'the cause'" in job.output
    assert job.restarts == 0


def test_scancel_ends_all_ranks_and_leaves_a_checkpoint(submit, run, tmp_path):
    out = tmp_path / "out"
    job = submit("multi_node", RANKS, digits(out, "--checkpoint-every", 5))
    job.until_it_says("epoch   1/")
    assert len(ranks_of(tmp_path)) >= 2
    job.cancel()
    assert job.until_over() == "CANCELLED"

    _, alive = psutil.wait_procs(ranks_of(tmp_path), GONE_SECONDS)
    assert not alive
    assert "Killed" not in job.output  # SIGTERM was enough
    again = run("multi_node", RANKS, digits(out, "--resume"))
    assert "goes on after step" in again
    assert f"epoch   {EPOCHS}/{EPOCHS}" in again


def ranks_of(folder):
    """Processes of Python that have a word of the test's folder."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if (process.info["name"] or "").startswith("python")
        and any(str(folder) in word for word in process.info["cmdline"] or ())
        and "pytest" not in (process.info["cmdline"] or ())
    ]
