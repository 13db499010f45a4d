"""A stuck job reports who is late, and ends by itself."""

from __future__ import annotations

import os
import re

import pytest

TRAIN = """
    import os, signal, sys, time, torch, mpiddl
    world = mpiddl.init()
    torch.manual_seed(0)
    layers = torch.nn.Linear(300, 300), torch.nn.ReLU(), torch.nn.Linear(300, 4)
    model = mpiddl.DataParallel(torch.nn.Sequential(*layers), bucket_size="64KiB")
    for step in range(1, 6):
        if world.rank == 1 and step == 4:
            {action}
        model(torch.ones(2, 300)).sum().backward()
    print("trained", flush=True)
"""
HOST = os.uname().nodename


def said_by(job, rank):
    """What rank ``rank`` reported."""
    start = job.both.index(f"mpiddl: rank {rank} of 3 on {HOST}")
    text = job.both[start + 1 :]
    return text[: text.index("mpiddl trace show")]


def run(start, tmp_path, code, **env):
    env = {"MPIDDL_TIMEOUT": "2", "TMPDIR": str(tmp_path), **env}
    job = start(3, code, env=env)
    assert job.status != 0, job.both
    return job


def recorders(tmp_path):
    return sorted(path.name for path in tmp_path.glob(f"mpiddl-{os.getuid()}/*/*.events"))


@pytest.mark.library
def test_a_rank_stuck_in_its_data_loader(start, tmp_path):
    job = run(start, tmp_path, TRAIN.format(action="time.sleep(1000)"), MPIDDL_ENGINE="thread")

    for rank in (0, 2):
        said = said_by(job, rank)
        assert re.search(r"has waited for 2\.?\d* s and nothing moved", said)
        assert "model 1 is in backward 4: bucket 0 ('2.bias', '2.weight'" in said
        assert "rank 1 is late: it does not wait; model 1 has ended backward 3" in said
        assert "script.py:9 in <module>: time.sleep(1000)" in said
    assert "rank 2 waits too" in said_by(job, 0)
    assert "is waited for" in said_by(job, 1)
    assert "script.py:9 in <module>: time.sleep(1000)" in said_by(job, 1)
    assert recorders(tmp_path) == ["rank-0.events", "rank-1.events", "rank-2.events"]
    folder = re.search(r"mpiddl trace show (\S+)", job.both).group(1)
    shown = start(None, ["python", "-m", "mpiddl", "trace", "show", folder])
    assert "last  ended backward 3" in shown.out, shown.both
    assert "launched bucket 6 ('0.weight'), 58.6KiB" in shown.out


@pytest.mark.by_day(0)
def test_a_rank_stuck_in_the_middle_of_a_backward(start, tmp_path):
    action = "model.module[0].bias.register_hook(lambda gradient: time.sleep(1000))"
    job = run(start, tmp_path, TRAIN.format(action=action), MPIDDL_ENGINE="inline")

    assert "bucket 0 lacks the gradients of '0.bias', bucket 1 lacks" in said_by(job, 1)
    assert "rank 1 is late" in said_by(job, 0)


def test_a_rank_that_skipped_a_backward(start, tmp_path):
    job = run(start, tmp_path, TRAIN.format(action="continue"))

    assert "model 1 is in backward 5: bucket 0" in said_by(job, 0)
    assert "rank 1 is not there: its program has ended; model 1 has ended backward 4" in job.both


@pytest.mark.by_day(0)
def test_a_stopped_rank(start, tmp_path):
    job = run(start, tmp_path, TRAIN.format(action="os.kill(os.getpid(), signal.SIGSTOP)"))

    assert "rank 1 is late: no sign of life for" in said_by(job, 0)
    assert "rank 1 is late: no sign of life for" in said_by(job, 2)


@pytest.mark.library
def test_a_rank_whose_end_no_launcher_sees(start, tmp_path):
    """Its shell lives on: only the ranks of its node can know."""
    script = tmp_path / "gone.py"
    script.write_text(
        "from os import _exit\n"
        "import torch, mpiddl\n"
        "world = mpiddl.init()\n"
        "mpiddl.barrier()\n"
        "_exit(77) if world.rank == 1 else mpiddl.barrier()\n"
    )
    shell = f"python {script}; status=$?; [ $status = 77 ] && exec sleep 600; exit $status"
    job = start(3, ["sh", "-c", shell], env={"TMPDIR": str(tmp_path)})

    assert job.status != 0
    for rank in (0, 2):
        assert "misses rank 1: its process is gone" in said_by(job, rank)
        assert "rank 1 is gone since" in said_by(job, rank)


def test_nobody_can_come_any_more(start, tmp_path):
    """``python -c`` shows nobody the status of a SystemExit; the timeout is ten minutes."""
    code = "import mpiddl; rank = mpiddl.init().rank; mpiddl.barrier()\n"
    code += "if rank == 1: raise SystemExit(3)\n"
    code += "mpiddl.barrier()"
    job = start(3, ["python", "-c", code], env={"TMPDIR": str(tmp_path)})

    assert job.status != 0
    assert "waits, as all do that are left: nobody can come any more" in job.err
    assert "rank 1 is not there: its program has ended" in job.err


@pytest.mark.by_day(1)
@pytest.mark.parametrize("call", ["mpiddl.empty(10)", "world.split(0)"])
def test_calls_in_which_mpi_itself_waits(start, tmp_path, call):
    code = f"""
        import time, mpiddl
        world = mpiddl.init()
        mpiddl.barrier()
        if world.rank == 1:
            time.sleep(1000)
        {call}
    """
    job = run(start, tmp_path, code, MPIDDL_TIMEOUT="0.5s")

    assert f"in <module>: {call}" in said_by(job, 0)
    assert "rank 1 is late: it does not wait" in said_by(job, 0)


@pytest.mark.by_day(0)
def test_different_plans_where_nothing_checks(start, tmp_path):
    code = """
        import torch, mpiddl
        world = mpiddl.init()
        size = 1000 if world.rank == 1 else 100  # one bucket, or one for each parameter
        model = mpiddl.DataParallel(torch.nn.Linear(8, 8), bucket_size=size, check=False)
        model(torch.ones(2, 8)).sum().backward()
        mpiddl.barrier()
    """
    job = start(3, code, env={"MPIDDL_TIMEOUT": "1", "TMPDIR": str(tmp_path)})

    assert job.status != 0
    assert "mpiddl: rank" in job.err


def test_before_the_first_step_there_is_more_time(start, tmp_path):
    code = """
        import time, mpiddl
        world = mpiddl.init()
        mpiddl.barrier()
        if world.rank == 1:
            time.sleep(2.5)
        mpiddl.barrier()
        print("met", flush=True)
        if world.rank == 1:
            time.sleep(1000)
        mpiddl.barrier()
    """
    job = run(start, tmp_path, code, MPIDDL_TIMEOUT="1.5s")

    assert job.out.count("met") == 3, job.both
    assert "MPIDDL_TIMEOUT is 1.5 s, 3 times that before the first step" in job.both


def test_only_waits_count(start, tmp_path):
    """All ranks evaluate for long."""
    code = TRAIN.format(action="pass").replace("world.rank == 1 and step == 4:", "step == 4:")
    code = code.replace("pass", "mpiddl.barrier(); time.sleep(2)")
    job = start(3, code, env={"MPIDDL_TIMEOUT": "1", "TMPDIR": str(tmp_path)})
    assert (job.status, job.out.count("trained"), job.err) == (0, 3, ""), job.both
    assert list(tmp_path.glob("mpiddl-*/*")) == []
