"""Whole jobs, started with a real mpirun and seen from outside."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MPIRUN = str(TOP / "tools" / "mpirun")
HANGS = 600
"""Seconds after which a job is stuck; the slowest takes a tenth of that on an idle machine."""
SOON = 20
"""Seconds; on an idle machine less than one."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # some launchers give ranks a terminal
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


@pytest.fixture(scope="session", autouse=True)
def _clean_environment():
    """No setting of the caller's reaches the jobs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            # Unbuffered, print() writes a line in pieces, and lines of ranks would mix.
            if name.startswith(("MPIDDL_", "OMP_NUM_THREADS", "PYTHONUNBUFFERED")):
                patch.delenv(name)
        yield


class Job:
    """A finished job."""

    def __init__(self, process: subprocess.CompletedProcess, seconds: float) -> None:
        self.status = process.returncode
        self.out, self.err = (COLOUR.sub("", text) for text in (process.stdout, process.stderr))
        self.both = self.out + self.err
        self.seconds = seconds
        self.ended_at = time.time()


def run_job(ranks, program, *arguments, env=None, timeout=HANGS):
    """Run a program on so many ranks to its end; with ``ranks=None`` without a launcher.

    ``env`` adds to the environment.
    """
    launcher = [] if ranks is None else [MPIRUN, "-n", str(ranks)]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})}
    started = time.time()
    process = subprocess.run(
        [*launcher, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=TOP,
        check=False,
    )
    return Job(process, time.time() - started)


@pytest.fixture
def start(tmp_path):
    """``start(3, code)`` runs Python code on three ranks; ``start(3, ["program", ...])`` a program,
    both as ``run_job`` does."""

    def run(ranks, program, *arguments, **options):
        if isinstance(program, str):
            script = tmp_path / "script.py"
            script.write_text(textwrap.dedent(program))
            program = ["python", str(script)]
        return run_job(ranks, program, *arguments, **options)

    return run


@pytest.fixture
def shared_memory_files():
    """``shared_memory_files()`` lists new files in /dev/shm that no living process has mapped."""
    before = {path.name for path in SHARED_MEMORY.iterdir()}

    def left():
        until = time.monotonic() + SOON
        while found := unmapped():  # a launcher may still be cleaning up
            if time.monotonic() > until:
                return found
            time.sleep(0.05)
        return set()

    def unmapped():
        new = {path.name for path in SHARED_MEMORY.iterdir()} - before
        return {name for name in new if not any(name in maps for maps in all_maps())}

    return left


def all_maps():
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # gone meanwhile
            yield path.read_text()
