"""A rank that fails ends the job at once, says who it was, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import textwrap
import time

import psutil
import pytest
from conftest import MPIRUN, SOON
from matrix import times

WORK_FOR_EVER = """
    import sys, time, torch, mpiddl
    world = mpiddl.init()
    mpiddl.barrier()
    if world.rank == 1:
        print("failing at", time.time(), flush=True)
        {action}
    while True:
        mpiddl.all_reduce(torch.ones(100_000))
"""


def seconds_to_end(job):
    """From the rank's last words to the end of the launcher."""
    failing_at = re.search(r"failing at ([\d.]+)", job.out)
    assert failing_at, job.both
    return job.ended_at - float(failing_at.group(1))


@pytest.mark.library
def test_an_exception_names_rank_host_and_traceback(start, shared_memory_files):
    job = start(3, WORK_FOR_EVER.format(action="raise KeyError('the cause')"))

    assert job.status != 0
    assert f"rank 1 of 3 on {os.uname().nodename} failed" in job.err
    assert "KeyError: 'the cause'" in job.err
    assert "script.py" in job.err
    assert seconds_to_end(job) < SOON
    assert shared_memory_files() == set()


@pytest.mark.library
@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("action", "status"),
    [("sys.exit(3)", 3), ("sys.exit('no data')", 1), ("sys.exit(True)", 1)],
)
def test_a_status_of_one_rank_is_the_jobs(start, shared_memory_files, action, status):
    job = start(3, WORK_FOR_EVER.format(action=action))

    assert job.status == status, job.both
    assert f"rank 1 of 3 on {os.uname().nodename} exited with status {status}" in job.err
    assert "no data" in job.err or "no data" not in action
    assert seconds_to_end(job) < SOON
    assert shared_memory_files() == set()


@pytest.mark.library
@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("exit(3)", "exited with status 3"),
        (
            """
        import contextlib
        @contextlib.contextmanager
        def block():
            yield
        with block():
            sys.exit(3)
        """,
            "exited with status 3",
        ),
        (
            """
        try:
            sys.exit(3)
        except SystemExit as leaving:
            error = leaving
            error.itself = error
            raise
        """,
            "exited with status 3",
        ),
        (
            """
        import asyncio
        async def main():
            sys.exit(3)
        asyncio.run(main())
        """,
            "exited with status 3",
        ),
        (
            """
        sys.excepthook = lambda *error: print("another hook")
        raise ValueError
        """,
            "exited with status 1",
        ),
    ],
    ids=["exit", "context manager", "cycle", "asyncio", "another hook"],
)
def test_other_ways_to_leave(start, action, words):
    code = """
        import sys, time, torch, mpiddl
        world = mpiddl.init()
        if world.rank == 1:
            print("failing at", time.time(), flush=True)
            leave()
        while True:
            mpiddl.all_reduce(torch.ones(100_000))
    """
    job = start(2, f"def leave():\n    import sys\n{indented(action)}\n{textwrap.dedent(code)}")

    assert words in job.err, job.both
    assert seconds_to_end(job) < SOON


def indented(action):
    return textwrap.indent(textwrap.dedent(action), "    ")


@pytest.mark.parametrize(
    "action",
    [
        "sys.exit()",
        "sys.exit(0)",
        """
try:
    sys.exit(5)
except SystemExit as leaving:
    assert leaving.code == 5
""",
        """
import threading
thread = threading.Thread(target=sys.exit, args=(5,))
thread.start()
thread.join()
""",
    ],
    ids=["nothing", "zero", "caught", "in a thread"],
)
@pytest.mark.library
@pytest.mark.by_day(1)
def test_leaving_without_a_status_is_no_failure(start, action):
    job = start(2, f"import sys, mpiddl\nmpiddl.init()\nmpiddl.barrier()\n{action}")

    assert (job.status, job.err) == (0, ""), job.both


WAIT_IN_MPI = """
    import atexit, os, sys, time
    from sys import exit as leave
    import mpiddl
    world = mpiddl.init(device="cpu")
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
    if world.rank == 1:
        print("failing at", time.time(), flush=True)
        {action}
    MPI.COMM_WORLD.Barrier()
"""


@pytest.mark.parametrize(
    ("action", "status", "words"),
    [
        ("raise SystemExit(3)", 3, "exited with status 3"),
        ("leave(3)", 3, "exited with status 3"),
        # Nothing of 256 is left in the eight bits of a process's status.
        ("atexit.register(MPI.COMM_WORLD.Barrier); sys.exit(256)", 1, "exited with status 1"),
        ("os._exit(3)", 3, "left by os._exit(3)"),
    ],
    ids=["SystemExit", "imported exit", "256, and a handler that waits", "os._exit"],
)
@pytest.mark.library
def test_ways_that_pass_by_sys_exit(start, action, status, words):
    # Without torch: its import would take longer than all else.
    job = start(2, WAIT_IN_MPI.format(action=action), env={"OMP_NUM_THREADS": "1"})

    assert job.status == status, job.both
    assert f"rank 1 of 2 on {os.uname().nodename} {words}" in job.err


def test_an_error_before_a_work_completes_ends_the_job(start):
    """The exception leaves while collectives are in flight and the engine's thread runs."""
    code = """
        import time, torch, mpiddl
        world = mpiddl.init()
        work = mpiddl.all_reduce(torch.ones(1 << 22), async_=True)
        if world.rank == 1:
            print("failing at", time.time(), flush=True)
            raise ValueError("in flight")
        work.wait()
        mpiddl.barrier()
    """
    for engine in ("thread", "inline")[: times(2)]:
        job = start(2, code, env={"MPIDDL_ENGINE": engine})
        assert job.status != 0
        assert "ValueError: in flight" in job.err
        assert seconds_to_end(job) < SOON


def running_job(tmp_path, code):
    """A job of two ranks in a process group of its own; returns it when the ranks are at work."""
    script = tmp_path / "script.py"
    script.write_text(code)
    job = subprocess.Popen(
        [MPIRUN, "-n", "2", "python", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    pids = [int(job.stdout.readline().split()[-1]) for _ in range(2)]
    return job, pids


AT_WORK = """
import os, torch, mpiddl
world = mpiddl.init()
mpiddl.barrier()
print("at work", os.getpid(), flush=True)
while True:
    mpiddl.all_reduce(torch.ones(100_000))
"""


def end_of(job, pids, seconds):
    """Wait for the launcher; the ranks must be gone as well."""
    try:
        output, _ = job.communicate(timeout=seconds)
    finally:
        for pid in pids:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        job.kill()
    return output


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid)]


def wait_until_gone(pids):
    deadline = time.time() + SOON
    while alive(pids) and time.time() < deadline:
        time.sleep(0.02)
    return not alive(pids)


@pytest.mark.library
def test_ctrl_c_leaves_no_process_and_no_file(tmp_path, shared_memory_files):
    job, pids = running_job(tmp_path, AT_WORK)

    os.killpg(job.pid, signal.SIGINT)  # as a terminal does

    assert wait_until_gone(pids), "ranks survived"
    output = end_of(job, pids, SOON)
    assert job.returncode != 0, output
    assert "Traceback" not in output
    assert shared_memory_files() == set()


@pytest.mark.library
def test_a_killed_rank_ends_the_job(tmp_path):
    job, pids = running_job(tmp_path, AT_WORK)

    os.kill(pids[1], signal.SIGKILL)

    assert wait_until_gone(pids), "a rank survived"
    end_of(job, pids, SOON)
    assert job.returncode != 0


def test_an_exception_inside_join_ends_the_job(start):
    """The rank that has run out of batches is waiting for the others' announcements."""
    code = """
    import time, torch, mpiddl
    world = mpiddl.init()
    model = mpiddl.DataParallel(torch.nn.Linear(2, 1))
    with mpiddl.join(model):
        for step in range(3 * world.rank):
            if step == 2 and world.rank == 1:
                print("failing at", time.time(), flush=True)
                raise KeyError("the cause")
            model(torch.ones(1, 2)).sum().backward()
    """
    job = start(3, code)

    assert job.status != 0
    assert "rank 1 of 3" in job.err
    assert "KeyError: 'the cause'" in job.err
    assert seconds_to_end(job) < SOON


def test_a_rank_that_leaves_first_still_does_its_part(start):
    """Buckets are in flight when all ranks but one are through; that one saves the model."""
    job = start(
        2,
        """
        import time, torch, mpiddl
        world = mpiddl.init()
        layers = [torch.nn.Linear(1024, 1024) for _ in range(4)]
        model = mpiddl.DataParallel(torch.nn.Sequential(*layers), engine="after")
        optimizer = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
        def train():
            model(torch.ones(2, 1024)).sum().backward()
            optimizer.step()
        train()
        if world.rank == 0:
            time.sleep(1)  # the others are gone, as far as they can be
            model.state_dict()
            print("saved", flush=True)
        """,
    )
    assert (job.status, job.out.split()) == (0, ["saved"]), job.both


def test_what_all_ranks_meet_is_said_once(start):
    job = start(3, "import mpiddl\nmpiddl.ShardBatchSampler(1, mpiddl.init(), batch_size=4)\n")
    assert job.status != 0
    assert job.both.count("1 samples for 3 ranks") == 1, job.both
