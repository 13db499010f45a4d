"""Jobs that end before they are through: preempted, cancelled, failed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
from batch import DIGITS, call

HELD = Path(__file__).with_name("held.py")
EPOCHS = 3
RANKS = ["--ntasks-per-node=1"]
GONE_SECONDS = 60.0


def flags(out, *more):
    return ["--epochs", EPOCHS, "--out", out, *more]


def learned(out):
    """What training has made of the data, without what depends on the machine."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["epoch"], row["step"], row["loss"], row["test_accuracy"]) for row in rows]


def preempt_by_hand(job):
    job.signal("USR1")


def preempt_by_urgent_jobs(job):
    """They need all cores. Slurm sends the --signal of the job in their way, and gives it time."""
    call(
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--ntasks=4",
        "--output=/dev/null",
        "--wrap=true",
    )


def test_a_preempted_job_goes_on_where_it_was(submit, tmp_path):
    out = tmp_path / "out"
    undisturbed = submit("multi_node", RANKS, [DIGITS, *flags(tmp_path / "undisturbed")])
    job = submit("preemptible", RANKS, [HELD, 2, *flags(out)])
    for epoch, preempt in enumerate([preempt_by_hand, preempt_by_urgent_jobs], start=1):
        job.until_it_says(f"epoch   {epoch}/")
        preempt(job)
        job.until(lambda times=epoch: len(steps_saved(job)) == times, "saved")
        assert undisturbed.until_over() == "COMPLETED", undisturbed.output  # while the other waits
    assert job.until_over() == "COMPLETED", job.output

    assert job.restarts == 2
    for step in steps_saved(job):
        assert f"goes on after step {step}, " in job.output
    assert job.output.count("epoch   1/") == 1
    # No sample was left out, and none was seen twice.
    assert len(learned(out)) == EPOCHS
    assert learned(out) == learned(tmp_path / "undisturbed"), job.output


def steps_saved(job):
    return re.findall(r"SIGUSR1: saved after step (\d+)", job.output)


def test_a_signal_before_the_program_is_ready(submit, tmp_path):
    """It kills the ranks. The job may be started again, but here only once."""
    program = tmp_path / "not ready.py"
    program.write_text(
        "import os, pathlib, time\n"
        "pathlib.Path('started-' + os.environ['SLURM_PROCID']).touch()\n"
        "while True: time.sleep(1)\n"
    )
    job = submit("preemptible", RANKS, [program], env={"MOST_RESTARTS": "0"})
    job.until(lambda: len(list(tmp_path.glob("started-*"))) == 2, "ranks")
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
    job = submit("multi_node", RANKS, [HELD, 1, *flags(out, "--checkpoint-every", 5)])
    job.until_it_says("epoch   1/")
    assert len(ranks_of(tmp_path)) >= 2
    job.cancel()
    assert job.until_over() == "CANCELLED"

    _, alive = psutil.wait_procs(ranks_of(tmp_path), GONE_SECONDS)
    assert not alive
    assert "Killed" not in job.output  # SIGTERM was enough
    again = run("multi_node", RANKS, [DIGITS, *flags(out, "--resume")])
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
