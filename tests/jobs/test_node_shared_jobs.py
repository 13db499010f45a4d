"""Node-shared data in whole jobs: its memory, its end, and what killed jobs leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import textwrap
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import HANGS, MPIRUN, SHARED_MEMORY
from test_shared_memory import start_with  # noqa: F401 - a fixture

ONE_COPY = """
    import os, re, sys, warnings
    from pathlib import Path
    import torch, mpiddl
    from torch.utils.data import DataLoader, Dataset
    from mpiddl.data.moving.node_shared import NodeSharedDataset

    LENGTH, WIDTH = 4096, 1024                               # 32 MiB

    class Whole(Dataset):
        def __init__(self, dataset):
            self.dataset = dataset
        def __len__(self):
            return 8
        def __getitem__(self, index):
            images, labels = self.dataset.arrays
            return os.getpid(), images.sum(), labels.sum()

    def mapped_by_whom(name):
        found = {}
        for path in Path("/proc").glob("[0-9]*/smaps"):
            try:
                text = path.read_text()
            except OSError:
                continue
            part = re.search(re.escape(name) + r"\\n(?:\\w+: .*\\n)+", text)
            if part:
                numbers = dict(re.findall(r"(\\w+): +(\\d+) kB", part.group()))
                found[int(path.parent.name)] = {key: int(kib) for key, kib in numbers.items()}
        return found

    if __name__ == "__main__":
        warnings.simplefilter("error")
        world = mpiddl.init()
        images = torch.arange(LENGTH * WIDTH).view(LENGTH, WIDTH)
        labels = torch.arange(LENGTH)
        sums = int(images.sum()), int(labels.sum())
        dataset = NodeSharedDataset(*([images, labels] if world.local_rank == 0 else []))
        del images
        (name,) = {path.name for path in Path("/dev/shm").glob("mpiddl-data-*")
                   if path.name in Path("/proc/self/maps").read_text()}
        assert dataset.arrays[0].sum() == sums[0]
        loader = DataLoader(Whole(dataset), num_workers=2, multiprocessing_context="forkserver",
                            persistent_workers=True)
        workers = set()
        for process, *found in loader:
            workers.add(int(process))
            assert [int(value) for value in found] == list(sums)
        mpiddl.barrier()
        if world.rank == 0:
            found = mapped_by_whom(name).values()
            total = {key: sum(each[key] for each in found) for key in ("Pss", "Rss")}
            dirty = max(each["Private_Dirty"] for each in found)
            print("processes", len(found), "pss", total["Pss"], "rss", total["Rss"], "dirty",
                  dirty, flush=True)
        mpiddl.barrier()
        assert len(workers) == 2
        print("rank", world.rank, "held", name, flush=True)
"""

HOLD = """
    import sys, time, torch, mpiddl
    from mpiddl.data.moving.node_shared import NodeSharedDataset
    world = mpiddl.init()
    dataset = NodeSharedDataset(torch.arange(9) if world.local_rank == 0 else None,
                                folder=sys.argv[1])
    mpiddl.barrier()
    if world.rank == 0:
        print("holding", flush=True)
    {then}
"""

WAIT = """
    while True:
        mpiddl.all_reduce(torch.ones(10))
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    return path


def held(then):
    return textwrap.dedent(HOLD).replace("{then}", textwrap.dedent(then))


@contextmanager
def holding(folder, script, ranks=2):
    """A job that has a data set, until it is killed."""
    script.write_text(held(WAIT))
    job = subprocess.Popen(
        [MPIRUN, "-n", str(ranks), "python", str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    members = []
    try:
        assert job.stdout is not None
        while b"holding" not in job.stdout.readline():
            assert job.poll() is None
        members = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        yield job, members
    finally:
        kill(members or [psutil.Process(job.pid)])
        job.communicate(timeout=HANGS)


def kill(members):
    for process in members:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(members, timeout=HANGS)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_ranks_and_their_workers_have_one_copy(start):
    job = start(2, ONE_COPY)

    assert job.status == 0, job.both
    processes, pss, rss, dirty = map(
        int, re.search(r"processes (\d+) pss (\d+) rss (\d+) dirty (\d+)", job.out).groups()
    )
    assert processes == 6, "two ranks with two workers each"
    kib = (4096 * 1024 * 8 + 4096 * 8) // 1024
    assert 0.98 * kib <= pss <= 1.02 * kib, f"{pss} KiB in all, the file has {kib}"
    assert rss >= 5.9 * kib, "not all have read it"
    assert dirty <= kib // 100
    name = re.search(r"held (\S+)", job.out).group(1)
    assert not (SHARED_MEMORY / name).exists(), "left behind at exit"


def test_a_killed_jobs_file_goes_with_the_next_start_and_no_other(start, folder, tmp_path):
    with holding(folder, tmp_path / "first.py"):
        (living,) = names(folder)
        with holding(folder, tmp_path / "second.py") as (_, members):
            (killed,) = names(folder) - {living}
            kill(members)
            assert names(folder) == {living, killed}
        job = start(2, held(""), str(folder))
        assert job.status == 0, job.both
        assert names(folder) == {living}
    assert names(folder) == {living}


@pytest.mark.by_day(1)
@pytest.mark.parametrize("end", ["", "kept = dataset[2], dataset.arrays; sys.exit(0)"])
def test_nothing_is_left_at_exit(start, folder, end):
    job = start(3 if end else 1, held(end), str(folder))
    assert job.status == 0, job.both
    assert names(folder) == set()


@pytest.mark.by_day(0)
@pytest.mark.parametrize("end", ["an exception", "Ctrl-C"])
def test_at_the_latest_the_next_start_removes_it(start, folder, tmp_path, end):
    if end == "Ctrl-C":
        with holding(folder, tmp_path / "held.py") as (job, _):
            os.killpg(job.pid, signal.SIGINT)
            job.wait(timeout=HANGS)
    else:
        failure = f"if world.rank == 1: raise KeyError('why')\n{textwrap.dedent(WAIT)}"
        assert start(2, held(failure), str(folder)).status != 0
    job = start(1, held(""), str(folder))
    assert job.status == 0, job.both
    assert names(folder) == set()


def test_a_rank_that_fails_takes_it_along_in_shared_memory(start):
    code = """
    import torch, mpiddl
    world = mpiddl.init()
    data = mpiddl.data.NodeSharedDataset(torch.arange(8) if world.rank == 0 else None)
    print("held", data._path, flush=True)
    mpiddl.barrier()
    if world.rank == 1:
        raise KeyError("why")
    mpiddl.recv(torch.empty(1), 1)
    """
    job = start(2, code)
    assert job.status != 0
    path = re.search(r"held (\S+)", job.out).group(1)
    assert path.startswith(str(SHARED_MEMORY))
    assert not Path(path).exists()


def test_writing_ends_the_process(start, folder):
    job = start(1, held("dataset.arrays[0][0] = 1; print('written')"), str(folder))
    assert job.status != 0
    assert "written" not in job.out, job.both


FULL = """
    import os, torch, mpiddl
    from mpiddl.data.moving.node_shared import NodeSharedDataset
    world = mpiddl.init()
    data = torch.zeros(64 << 20, dtype=torch.uint8) if world.rank == 0 else None
    try:
        NodeSharedDataset(data)
    except mpiddl.errors.DataError as error:
        print(world.rank, error, flush=True)
    mpiddl.barrier()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("mpiddl-data-")]
    small = NodeSharedDataset(data[: 1 << 20] if world.rank == 0 else None)
    assert len(small) == 1 << 20
    print("right", flush=True)
"""


def test_full_shared_memory_is_one_error_on_every_rank(start_with):  # noqa: F811
    job = start_with("64m", 2, FULL)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("right") == 2
    pattern = r"rank 0 on \S+: cannot share 64MiB in /dev/shm \(only \S+ are left\); free some"
    assert len(re.findall(pattern, job.stdout)) == 2, job.stdout
