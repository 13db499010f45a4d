"""The lab itself: hosts of their own, shaped links, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import LAB, TOP

WHO = ["sh", "-c", 'echo "$(hostname) $(cat /sys/class/net/eth0/address)"']


def test_hosts_have_names_and_networks_of_their_own(lab):
    job = lab(["--hosts", "3", "--ranks-per-host", "2"], *WHO)

    assert job.returncode == 0, job.stderr
    lines = sorted(job.stdout.splitlines())
    assert [line.split()[0] for line in lines] == ["host1"] * 2 + ["host2"] * 2 + ["host3"] * 2
    assert len(set(lines)) == 3


@pytest.mark.parametrize(
    ("placement", "hosts"), [("block", ["host1", "host1"]), ("cyclic", ["host1", "host2"])]
)
def test_placement(lab, placement, hosts):
    code = "import mpiddl; w = mpiddl.init(); print(w.rank, w.hostname, flush=True)"
    options = ["--ranks-per-host", "2", "--placement", placement]
    job = lab(options, "python", "-c", code)

    assert job.returncode == 0, job.stderr
    assert [line.split()[1] for line in sorted(job.stdout.splitlines())][:2] == hosts


def test_links_are_no_faster_than_asked(lab):
    job = lab(["--tcp", "--rate", "80mbit", "--seconds", "1"])

    assert job.returncode == 0, job.stderr
    for rate in json.loads(job.stdout)["mb_per_second"].values():
        assert 1 < rate <= 10.1


def test_the_commands_status_is_the_labs(lab):
    assert lab([], "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(environment, tmp_path, number):
    networks = list(Path("/sys/class/net").iterdir())
    shared = set(Path("/dev/shm").iterdir())  # noqa: S108
    marker = str(tmp_path)
    command = ["sh", "-c", "echo up; while sleep 1000; do :; done", marker]
    with subprocess.Popen(
        [*LAB, "--", *command], stdout=subprocess.PIPE, env=environment, cwd=TOP
    ) as job:
        assert job.stdout.readline() == b"up\n"
        below = psutil.Process(job.pid).children(recursive=True)
        assert len(below) > 5
        os.kill(job.pid, number)
        job.wait(30)
    _, alive = psutil.wait_procs(below, 30)

    assert not alive
    assert list(Path("/sys/class/net").iterdir()) == networks
    assert set(Path("/dev/shm").iterdir()) <= shared  # noqa: S108
    if number != signal.SIGKILL:
        assert job.returncode == 128 + number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rate", "fast", "--", "true"], "'fast' is not like 200mbit"),
        (["--rate", "0mbit", "--", "true"], "is not like"),
        (["--hosts", "0", "--", "true"], "whole number from 1"),
        (["--loss", "100", "--", "true"], "percentage"),
        ([], "give either a COMMAND"),
        (["--tcp", "--", "true"], "give either a COMMAND"),
        (["--tcp", "--hosts", "1"], "--hosts 2 or more"),
        (["--speed", "1", "--", "true"], "unrecognized arguments: --speed"),
    ],
)
def test_wrong_flags(lab, options, words):
    job = lab(options)

    assert job.returncode == 2
    assert words in job.stderr
    assert "Traceback" not in job.stderr
