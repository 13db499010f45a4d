"""A node with little shared memory, and ranks that end while they use it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import textwrap

import psutil
import pytest
from conftest import HANGS, MPIRUN

SMALL = """
    import torch, mpiddl
    world = mpiddl.init()
    too_large = mpiddl.empty(48 << 18)                      # 48 MiB a rank of 64 in all
    again = mpiddl.empty(48 << 18)
    fits = mpiddl.empty(1 << 18)
    for tensor in (too_large, again, fits):
        tensor.fill_(world.rank + 1.0)                     # every page is touched
        mpiddl.all_reduce(tensor)
        assert bool((tensor == world.size * (world.size + 1) / 2).all())
    assert world.windows.find(too_large.data_ptr()) == (0, 0)
    assert world.windows.find(fits.data_ptr()) != (0, 0)
    model = mpiddl.DataParallel(torch.nn.Linear(4096, 4096))  # 64 MiB of gradients
    model(torch.full((1, 4096), float(world.rank))).sum().backward()
    gradient = model.module.weight.grad
    assert bool((gradient == sum(range(world.size)) / world.size).all())
    print("right", flush=True)
"""

NONE = """
    import torch, mpiddl
    world = mpiddl.init()
    assert world.lane_window is None
    for length in (3, 3000, 300_000):
        tensor = mpiddl.empty(length).fill_(1)
        mpiddl.all_reduce(tensor)
        assert bool((tensor == world.size).all())
    try:
        mpiddl.all_reduce(tensor, algorithm="shared")
    except mpiddl.errors.UnsupportedBufferError as error:
        assert "too little of it left" in str(error)
    model = mpiddl.DataParallel(torch.nn.Linear(100, 100))
    model(torch.ones(1, 100)).sum().backward()
    print("right", flush=True)
"""


@pytest.fixture
def start_with(tmp_path):
    """``start_with("64m", 2, code)`` runs ranks that see a /dev/shm of that size."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, to mount a small /dev/shm")

    def run(size, ranks, code):
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        mount = f'mount -t tmpfs -o size={size} small /dev/shm && exec "$@"'
        inside = ["unshare", "--mount", "sh", "-c", mount, "sh"]
        return subprocess.run(
            [*inside, MPIRUN, "-n", str(ranks), "python", str(script)],
            capture_output=True,
            text=True,
            timeout=HANGS,
        )

    return run


def test_little_shared_memory_is_used_as_far_as_it_goes(start_with):
    job = start_with("64m", 2, SMALL)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("right") == 2
    assert job.stderr.count("no shared memory for 48MiB a rank") == 1, job.stderr
    assert "--shm-size" in job.stderr


def test_without_shared_memory_messages_do_it(start_with):
    job = start_with("14m", 2, NONE)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("right") == 2
    assert job.stderr.count("no shared memory") == 1, job.stderr


@pytest.mark.library
def test_interpreter_ends_while_buffers_live(start, shared_memory_files):
    job = start(
        3,
        """
        import torch, mpiddl
        world = mpiddl.init()
        kept = [mpiddl.empty(1 << 18) for _ in range(3)]
        views = [tensor[5:].numpy() for tensor in kept]
        model = mpiddl.DataParallel(torch.nn.Linear(500, 500))
        model(torch.ones(1, 500)).sum().backward()
        group = world.split(world.rank % 2)
        for _ in range(3):
            mpiddl.all_reduce(kept[0].fill_(1))
        print("done", flush=True)
        """,
    )
    assert job.status == 0, job.both
    assert job.out.count("done") == 3
    assert shared_memory_files() == set()


def test_a_rank_alone_leaves_no_shared_memory(start, shared_memory_files):
    """Started without a launcher; it loads Open MPI."""
    assert start(None, "import mpiddl; mpiddl.init()").status == 0
    assert shared_memory_files() == set()


@pytest.mark.library
def test_nothing_stays_behind_when_ranks_are_killed(tmp_path, shared_memory_files):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import mpiddl
            world = mpiddl.init()
            tensor = mpiddl.empty(1 << 20).fill_(0)
            print("running", flush=True)
            while True:
                mpiddl.all_reduce(tensor)
            """
        )
    )
    job = subprocess.Popen(
        [MPIRUN, "-n", "2", "python", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert job.stdout is not None
    while b"running" not in job.stdout.readline():
        assert job.poll() is None
    for child in psutil.Process(job.pid).children(recursive=True):
        if "script.py" in " ".join(child.cmdline()):
            child.send_signal(signal.SIGKILL)
    job.communicate(timeout=HANGS)
    assert {name for name in shared_memory_files() if "mpiddl" in name} == set()
