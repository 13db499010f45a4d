"""Jobs that are killed while they write checkpoints, told to leave, or find the disk full."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import run_job
from matrix import times
from safetensors.torch import load_file

import mpiddl
from mpiddl.checkpoint.folders import WRITING, checkpoints, latest
from mpiddl.checkpoint.index import read_index

DIGITS = ["python", "jobs/digits.py", "--epochs", "2", "--batch-size", "64"]
STEPS = 2 * 23
DEADLINE = 600
KILLS = times(100)
PREPARED = ("mpiddl.checkpoint.saving", "mpiddl.checkpoint.loading", "safetensors.torch")
"""What writers need, but MPI."""


def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Each time it goes on from what it finds, and writes until it is killed."""
    torch.set_num_threads(1)  # what forks must have no threads
    for name in PREPARED:
        importlib.import_module(name)
    random.seed(0)
    reported = dict.fromkeys((tmp_path / name for name in "abcd"), 0)
    unfinished = 0
    for _ in range(KILLS // len(reported)):
        writers = [(folder, *_start_writer(folder)) for folder in reported]
        for folder, child, lines in writers:
            assert lines.readline() == "begins\n"
            time.sleep(random.uniform(0, 0.03))  # no condition: any moment is right
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with lines:
                told = [int(line) for line in lines.read().splitlines()]
            unfinished += any(folder.glob(f"{WRITING}*"))
            reported[folder] = _check_what_is_left(folder, max([reported[folder], *told]))
    assert sum(reported.values()) > KILLS / 4
    assert unfinished > KILLS / 10  # or nobody was killed while it wrote


def _start_writer(folder):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _write_for_ever(folder, writer)
    os.close(writer)
    return child, open(reader)


def _check_what_is_left(folder, reported):
    """Returns: the step that is there."""
    path = latest(folder)
    assert path == (checkpoints(folder) or [None])[-1]  # there never is a broken one
    if path is None:
        assert reported == 0
        return 0
    index = read_index(path)
    assert reported <= index.step <= reported + 1  # the last line may be lost with the writer
    values = load_file(path / "part-000.safetensors").values()
    assert sum(bool((tensor == index.step).all()) for tensor in values) == 3
    return index.step


def _write_for_ever(folder, writer):
    """In a child; starts an MPI of its own."""
    os.setsid()
    world = mpiddl.init(device="cpu")
    found = mpiddl.checkpoint.load(folder)
    step = 0 if found is None else found.step
    os.write(writer, b"begins\n")
    while True:
        step += 1
        values = {name: torch.full((20_000,), float(step)) for name in "abc"}
        mpiddl.checkpoint.save(folder, step, world=world, values=values)
        os.write(writer, f"{step}\n".encode())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The parameters of a job that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole")
    job = run_job(2, [*DIGITS, "--out", str(out)])
    assert job.status == 0, job.both
    return (out / "model.safetensors").read_bytes()


def _launch(out, *flags, ranks=2):
    top = Path(__file__).parents[2]
    return subprocess.Popen(
        [str(top / "tools" / "mpirun"), "-n", str(ranks), *DIGITS, "--out", str(out), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=top,
    )


def _ranks_of(out):
    """Processes of the job's ranks, not of its launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if "python" in Path(words[0]).name and str(out) in words:
                found.append(int(path.parent.name))
    return found


def _wait_for(condition, job):
    until = time.monotonic() + DEADLINE
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_killed_job_goes_on_and_ends_with_the_same_bits(start, tmp_path, whole):
    """At random steps, a rank at a time."""
    out = tmp_path / "killed"
    random.seed(1)
    for number, step in enumerate(sorted(random.sample(range(3, STEPS - 4), times(4)))):
        job = _launch(out, "--checkpoint-every", "1", *(["--resume"] if number else []))
        _wait_for(lambda at=step: _last_step(out) >= at, job)
        os.kill(_ranks_of(out)[number % 2], signal.SIGKILL)
        said = job.communicate(timeout=DEADLINE)[0]
        assert job.returncode != 0
        assert ("goes on after step" in said) == (number > 0)

    job = start(2, [*DIGITS, "--out", str(out), "--resume"])
    assert job.status == 0, job.both
    assert "goes on after step" in job.out
    assert (out / "model.safetensors").read_bytes() == whole
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, STEPS // 2), (2, STEPS)]


def _last_step(out):
    found = checkpoints(out / "checkpoints")
    return int(found[-1].name.split("-")[1]) if found else 0


def test_usr1_saves_and_leaves_with_a_status_of_its_own(start, tmp_path, whole):
    """One rank gets the signal; all leave after the same step, in mid-epoch."""
    out = tmp_path / "asked"
    job = _launch(out, "--checkpoint-every", "5")
    _wait_for(lambda: _last_step(out) >= 5, job)
    os.kill(_ranks_of(out)[1], signal.SIGUSR1)
    said = job.communicate(timeout=DEADLINE)[0]
    assert job.returncode == 75, said
    step = _last_step(out)
    assert f"SIGUSR1: saved after step {step}, leaves with status 75; go on with --resume" in said

    # A new start would mix two runs' checkpoints: it is refused, and nothing is lost.
    job = start(None, [*DIGITS, "--out", str(out)])
    assert job.status == 2
    assert "has checkpoints of a run that is not finished: go on with it by --resume" in job.err
    assert _last_step(out) == step

    job = start(2, [*DIGITS, "--out", str(out), "--resume"])
    assert f"goes on after step {step}" in job.out
    assert (out / "model.safetensors").read_bytes() == whole


@pytest.mark.by_day(0)
def test_a_finished_run_can_go_on(start, tmp_path):
    flags = ["--epochs", "1", "--out", str(tmp_path)]
    job = start(2, [*DIGITS, *flags])
    assert job.status == 0, job.both
    assert len(checkpoints(tmp_path / "checkpoints")) == 1
    assert (tmp_path / "finished").exists()
    job = start(2, [*DIGITS, *flags, "--epochs", "2", "--resume"])
    assert "epoch   2/2" in job.out
    assert "epoch   1/2" not in job.out


@pytest.mark.by_day(0)
def test_who_goes_on_with_a_finished_run_has_not_finished(start, tmp_path):
    """A new start says so."""
    assert start(1, [*DIGITS, "--epochs", "1", "--out", str(tmp_path)]).status == 0
    job = _launch(tmp_path, "--epochs", "9", "--resume", "--checkpoint-every", "1")
    _wait_for(lambda: _last_step(tmp_path) > STEPS / 2, job)
    os.kill(_ranks_of(tmp_path)[0], signal.SIGKILL)
    job.communicate(timeout=DEADLINE)
    job = start(2, [*DIGITS, "--out", str(tmp_path)])
    assert job.status == 2
    assert "of a run that is not finished" in job.err


WORKERS = """
    import os, signal, torch, mpiddl
    from dataclasses import dataclass
    from pathlib import Path
    from mpiddl import job

    @dataclass
    class Flags(job.Flags):
        out: Path = Path({out!r})

    def main(flags):
        world = mpiddl.init(device="cpu")
        model = mpiddl.DataParallel(torch.nn.Linear(4, 1))
        data = torch.utils.data.TensorDataset(torch.randn(400, 4))
        batches = mpiddl.ShardBatchSampler(data, world, batch_size=8)
        loader = mpiddl.data.loader(data, batches=batches, num_workers=1)
        run = job.Run(flags, world, model=model, batches=batches)
        for _ in run.epochs():
            for step, (x,) in enumerate(loader):
                with model.batch(local=len(x), total=batches.total_at(step)):
                    model(x).square().mean().backward()
                if run.steps == 9:  # as launchers do: everybody whom this rank has started
                    os.killpg(os.getpgid(0), signal.SIGUSR1)
                run.step(len(x))
            run.epoch_ends()

    if __name__ == "__main__":
        os.setpgid(0, 0)
        job.start(main, Flags)
"""


def test_a_signal_to_all_processes_of_a_rank_spares_its_loaders_workers(start, tmp_path):
    job = start(2, WORKERS.format(out=str(tmp_path / "out")))
    assert job.status == 75, job.both
    assert "SIGUSR1: saved after step 10" in job.out


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_keeps_the_last_good_checkpoint(start, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(out)], check=True)
    try:
        job = start(2, [*DIGITS, "--out", str(out), "--checkpoint-every", "7"])
        assert job.status == 2, job.both
        assert job.err.count("\nerror: ") + job.err.startswith("error: ") == 1
        assert "No space left on device" in job.err
        assert "those before it are kept" in job.err
        step = _last_step(out)
        assert step == 14
        assert latest(out / "checkpoints").name == f"step-{step:09d}"
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        job = start(2, [*DIGITS, "--out", str(out), "--resume"])
        assert f"goes on after step {step}" in job.out
        assert job.status == 0, job.both
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_checkpoint_of_another_job_is_refused(start, tmp_path):
    """Its model is another one."""
    script = f"""
        import torch, mpiddl
        mpiddl.init(device="cpu")
        mpiddl.checkpoint.save({str(tmp_path / "checkpoints")!r}, 3, model=torch.nn.Linear(2, 2),
            optimizer=None, batches=None, progress=None)
    """
    assert start(1, script).status == 0
    job = start(None, [*DIGITS, "--out", str(tmp_path), "--resume"])
    assert job.status == 2
    assert job.err.count("error: ") == 1
    assert "is of another model: the checkpoint has 'weight', this model not" in job.err
