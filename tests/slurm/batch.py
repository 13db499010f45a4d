"""Jobs in the queue of the lab's Slurm, seen from its login node."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

TOP = Path(__file__).parents[2]
SCRIPTS = TOP / "jobs" / "slurm"
DIGITS = TOP / "jobs" / "digits.py"
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 600.0
"""More than ten times what the longest of these jobs takes on an idle machine."""
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
OF_THE_CALLER = ("MPIDDL_", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "SBATCH_", "SRUN_")


def environment() -> dict[str, str]:
    """None of the caller's settings; root may start MPI jobs."""
    users = {name: text for name, text in os.environ.items() if not name.startswith(OF_THE_CALLER)}
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return users | allowed | {"VENV": str(TOP / ".venv")}


def call(*command: object) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


class Job:
    """One of the queue. ``number`` is Slurm's; ``7_0`` is a task of an array."""

    def __init__(self, number: str) -> None:
        self.number = number

    def asked(self, name: str) -> str:
        """A value of ``scontrol show job``."""
        shown = call("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found.group(1)

    @property
    def state(self) -> str:
        return self.asked("JobState")

    @property
    def restarts(self) -> int:
        return int(self.asked("Restarts"))

    @property
    def output(self) -> str:
        path = Path(self.asked("StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it, and fail if it does not come or the job is over."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            state = self.state  # before the condition, which a job that is over may still have met
            if condition():
                return
            assert state not in OVER, f"{state} and not yet {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"{state}, never {what}:\n{self.output}"
            time.sleep(POLL_SECONDS)

    def until_it_says(self, words: str) -> None:
        self.until(lambda: words in self.output, f"said {words!r}")

    def until_over(self) -> str:
        """Returns its last state."""
        self.until(lambda: self.state in OVER, "over")
        return self.state

    def signal(self, name: str) -> None:
        """To the script's shell, as Slurm itself does before the time is over."""
        call("scancel", f"--signal={name}", "--batch", self.number)

    def cancel(self) -> None:
        call("scancel", self.number)
