"""``mpiddl slurm`` as a user calls it, and what its scripts do when the signal comes."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from conftest import HANGS

SLURM = ["python", "-m", "mpiddl", "slurm"]
PROGRAM = ["python", "jobs/digits.py", "--epochs", "5"]

# What the ranks do at USR1, in bash, so that they are there at once.
SAVES = """\
trap 'if [ -e saving ]; then touch saved; exit 75; fi; touch saving' USR1
touch "ready${SLURM_RESTART_COUNT-}"
while [ ! -e enough ]; do read -t 0.05 <> <(:) || true; done
"""


def test_a_script_is_printed(start):
    plain, named = (start(None, [*SLURM, *words, *PROGRAM]) for words in (["--nodes", "2"], ["--"]))
    assert (plain.status, plain.err) == (0, "")
    assert plain.out.startswith("#!/bin/bash\n")
    assert "\n#SBATCH --nodes=2\n" in plain.out
    assert plain.out.endswith(" \\\n    python jobs/digits.py --epochs 5\n")
    assert named.out == plain.out.replace("--nodes=2", "--nodes=1")


def test_a_file_is_written_once_and_has_no_traps(start, tmp_path):
    file = tmp_path / "job.sbatch"
    first = start(None, [*SLURM, "-o", str(file), "--requeue", "--", *PROGRAM])
    assert (first.status, first.out) == (0, f"written to {file}; submit it: sbatch {file}\n")
    text = file.read_text()
    again = start(None, [*SLURM, "-o", str(file), "--", "other"])
    assert (again.status, again.out) == (2, "")
    assert again.err == f"error: {file} exists; pass --force to replace it\n"
    assert file.read_text() == text

    check = start(None, [*SLURM, "--check", str(file)])
    assert (check.status, check.out, check.err) == (0, f"{file}: none of the known traps\n", "")
    forced = start(None, [*SLURM, "--force", "-o", str(file), "--", "other"])
    assert (forced.status, forced.err) == (0, "")
    assert file.read_text().endswith("    other\n")


def test_traps_are_named_with_their_lines(start, tmp_path):
    file = tmp_path / "job.sbatch"
    file.write_text("#!/bin/bash\n#SBATCH -n 4\nexport OMP_NUM_THREADS=1\nsrun python x.py\necho\n")
    job = start(None, [*SLURM, "--check", str(file)])
    lines = job.out.splitlines()
    assert (job.status, job.err, len(lines)) == (1, "", 2), job.both
    assert all(line.startswith(f"{file}:4: ") for line in lines)
    assert "; write srun --mpi=pmix" in lines[1]


@pytest.mark.by_day(5)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "which program? Write: mpiddl slurm -- python script.py"),
        (["--time", "1h", "--", "x"], "'1h' is no time"),
        (["--name", "a b", "--", "x"], "'a b' is no name"),
        (["--partition", "a\nb", "--", "x"], "is no name"),
        (["--account", "", "--", "x"], "'' is no name"),
        (["--mpi", "openmpi", "--", "x"], "'openmpi' is none of pmix, pmi2, mpirun"),
        (["--nodes", "0", "--", "x"], "greater than or equal to 1"),
        (["-o", "no/a.sbatch", "--", "x"], "no/a.sbatch cannot be written: No such file"),
        (["--check", "no.sbatch"], "no.sbatch cannot be read: No such file"),
        (["--check", "."], ". cannot be read: Is a directory"),
        (["--check", "README.md"], "README.md is no script that can be checked: its first line"),
        (["--check", "README.md", "--", "x"], "takes no program"),
    ],
)
def test_a_refusal_is_one_message(start, options, words):
    job = start(None, [*SLURM, *options])
    assert (job.status, job.out) == (2, "")
    assert words in " ".join(job.err.replace("│", " ").split())
    assert "Traceback" not in job.err


def test_a_file_that_is_no_text(start, tmp_path):
    (tmp_path / "a").write_bytes(b"#!/bin/bash\n\xff\n")
    job = start(None, [*SLURM, "--check", str(tmp_path / "a")])
    assert (job.status, job.out, job.err) == (
        2,
        "",
        f"error: {tmp_path / 'a'} is no script: it is not text\n",
    )


def test_under_mpirun_one_rank_speaks(start):
    job = start(2, [*SLURM, "--", "x"])
    assert job.status == 0, job.both
    assert job.out.count("#!/bin/bash") == 1


class Batch:
    """A script that runs as Slurm would run it, with programs in place of srun and scontrol."""

    def __init__(self, start, folder):
        self.folder = folder
        self.script = folder / "job.sbatch"
        (folder / "ranks").write_text(SAVES)
        self.program("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
        self.program("scontrol", 'echo "$@" >> requeued')
        job = start(None, [*SLURM, "--requeue", "-o", str(self.script), "--", "bash", "ranks"])
        assert job.status == 0, job.both

    def program(self, name, text):
        (self.folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.folder / name).chmod(0o755)

    def begin(self, **environment):
        """Until the ranks are ready."""
        variables = {"PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
        self.process = subprocess.Popen(
            ["bash", str(self.script)],
            cwd=self.folder,
            env={**variables, "SLURM_JOB_ID": "7", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.until("ready" + environment.get("SLURM_RESTART_COUNT", ""))

    def until(self, name):
        """Until a file is there."""
        path = self.folder / name
        while not path.exists():
            assert self.process.poll() is None or path.exists(), self.process.communicate()
            time.sleep(0.01)

    def end(self):
        """Status, errors, and what scontrol was told."""
        error = self.process.communicate(timeout=HANGS)[1]
        told = self.folder / "requeued"
        return self.process.returncode, error, told.read_text() if told.exists() else ""


@pytest.fixture
def batch(start, tmp_path):
    made = Batch(start, tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.kill()


def test_the_signal_reaches_the_ranks_and_the_job_is_queued_again(batch):
    batch.begin()
    batch.process.send_signal(signal.SIGUSR1)
    batch.until("saving")
    assert batch.process.poll() is None  # `wait` has returned, and the shell waits again
    batch.process.send_signal(signal.SIGUSR1)
    assert batch.end() == (75, "", "requeue 7\n")
    assert (batch.folder / "saved").exists()

    # The same line goes on; what ends by itself is not queued again.
    (batch.folder / "requeued").unlink()
    batch.begin(SLURM_RESTART_COUNT="1")
    (batch.folder / "enough").touch()
    assert batch.end() == (0, "", "")


def test_a_failure_is_not_queued_again(batch):
    (batch.folder / "ranks").write_text("touch ready; exit 3")
    batch.begin()
    assert batch.end() == (3, "", "")


def test_a_program_that_was_still_starting_is_queued_again(batch):
    (batch.folder / "ranks").write_text(SAVES.partition("\n")[2])  # dies of USR1
    batch.begin()
    batch.process.send_signal(signal.SIGUSR1)
    status, _, told = batch.end()
    assert (status, told) == (138, "requeue 7\n")


def test_a_job_is_not_queued_for_ever(batch):
    (batch.folder / "ranks").write_text("touch ready100; exit 75")
    batch.begin(SLURM_RESTART_COUNT="100")
    assert batch.end() == (75, "started 101 times: giving up\n", "")


def test_the_ranks_are_told_to_resume(batch):
    (batch.folder / "ranks").write_text('touch ready; [ "$*" = --resume ]')
    batch.begin()
    assert batch.end() == (0, "", "")
