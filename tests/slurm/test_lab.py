"""The lab itself: what it says when it cannot start, and that nothing is left when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from batch import TOP

LAB = [sys.executable, str(TOP / "tools" / "slurm_lab")]


def lab(*arguments, **settings):
    return subprocess.run(
        [*LAB, *arguments], capture_output=True, text=True, timeout=90, check=False, **settings
    )


def test_the_commands_status_is_the_labs(slurm):
    """A lab within the lab: they are apart."""
    who = (
        'hostname; srun --nodes=3 hostname | sort; test "$(squeue --noheader | wc -l)" = 0; exit 7'
    )
    job = lab("--nodes", "3", "--", "bash", "-c", who)

    assert job.returncode == 7, job.stderr
    assert job.stdout.split() == ["host4", "host1", "host2", "host3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(slurm, number):
    command = ["sh", "-c", "echo up; while sleep 1000; do :; done"]
    with subprocess.Popen([*LAB, "--", *command], stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"up\n"
        below = psutil.Process(job.pid).children(recursive=True)
        names = {process.name() for process in below}
        assert {"slurmctld", "slurmd", "munged"} <= names
        os.kill(job.pid, number)
        job.wait(30)
    _, alive = psutil.wait_procs(below, 30)

    assert not alive
    if number != signal.SIGKILL:
        assert job.returncode == 128 + number


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a COMMAND after `--`, or --install"),
        (["--nodes", "0", "--", "true"], "at least 1"),
        (["--gpus", "many", "--", "true"], "'many' is not a whole number"),
    ],
)
def test_wrong_flags(arguments, words):
    job = lab(*arguments)

    assert job.returncode == 2
    assert words in job.stderr
    assert "Traceback" not in job.stderr


def test_packages_that_are_missing(slurm, tmp_path):
    job = lab("--", "true", env={"PATH": str(tmp_path)})

    assert job.returncode == 2
    assert "sbatch, srun missing" in job.stderr
    assert "apt-get install -y" in job.stderr
    assert "libpmix-dev" in job.stderr
