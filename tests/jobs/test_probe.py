"""The test whether MPI reads GPU memory, on host memory: how it starts, ends and leaves nothing.

Real launches from within a job of the same MPI, with mishaps made on purpose.
"""

from __future__ import annotations

import json
import os
import time

import psutil
import pytest

RUN = """
    import json, os, sys
    import mpiddl
    from mpiddl.launch import library
    from mpiddl.devices.cuda_aware import trial

    world = mpiddl.init()
    if world.rank == 0:
        mpi = library.describe()
        for timeout, mark, *options in json.loads(sys.argv[1]):
            outcome = trial.run_test(
                mpi["library"], mpi["path"], mark, os.environ, timeout, ["--host-memory", *options]
            )
            print(json.dumps(outcome._asdict()))
    mpiddl.barrier()
"""


@pytest.fixture
def mark():
    """A number that only processes of this test have on their command lines."""
    return os.getpid() * 1000 + int(time.time()) % 1000


def left_behind(mark):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any("trial_rank" in word for word in command) and str(mark) in command:
            found.append(process)
    return found


def test_crashes_and_wrong_bytes_are_answers(start, mark, shared_memory_files):
    mishaps = [[], ["--crash-at", "65536"], ["--crash-at", "1"], ["--garble-at", str(1 << 20)]]
    job = start(2, RUN, json.dumps([[60, mark, *mishap] for mishap in mishaps]))

    assert job.status == 0, job.both
    outcomes = [json.loads(line) for line in job.out.splitlines()]
    assert [outcome["passed"] for outcome in outcomes] == [64 << 20, 4096, 0, 65536]
    assert {(o["ranks"], o["ready"], o["timed_out"]) for o in outcomes} == {(2, True, False)}
    problems = [outcome["problem"] for outcome in outcomes]
    assert problems[0] is None
    assert all(problem.endswith("(SIGSEGV)") for problem in problems[1:3]), problems
    assert "1 of 1048576 bytes arrived wrong" in problems[3]
    assert not left_behind(mark)
    assert {name for name in shared_memory_files() if name.startswith("mpich")} == set()


def test_a_hang_is_an_answer(start, mark):
    job = start(2, RUN, json.dumps([[12, mark, "--hang-at", "65536"]]))

    outcome = json.loads(job.out)
    assert (outcome["passed"], outcome["timed_out"]) == (4096, True), job.both
    assert outcome["problem"] == "no answer after 12 s"
    assert not left_behind(mark)


@pytest.mark.by_day(0)
def test_what_cannot_start_is_no_answer(start, mark):
    code = RUN.replace('"--host-memory", ', "")  # and there is no GPU, or CuPy, of that number
    job = start(2, code, json.dumps([[60, mark]]))

    outcome = json.loads(job.out)
    assert (outcome["ready"], outcome["passed"]) == (False, 0), job.both
    assert outcome["problem"]
    assert not left_behind(mark)


@pytest.mark.by_day(0)
def test_without_a_launcher_a_rank_sends_to_itself(start, mark):
    code = RUN.replace('mpi["library"], mpi["path"]', '"an MPI without a launcher", None')
    job = start(2, code, json.dumps([[60, mark], [60, mark, "--crash-at", "4096"]]))

    well, badly = (json.loads(line) for line in job.out.splitlines())
    assert (well["ranks"], well["passed"], well["problem"]) == (1, 64 << 20, None), job.both
    assert (badly["ready"], badly["passed"]) == (True, 1)
    assert badly["problem"] == "killed by SIGSEGV"


KILLED = """
    import os, sys
    import signal, tempfile, threading
    from mpiddl.devices.cuda_aware import trial

    tempfile.tempdir = sys.argv[2]
    trial.GRACE = 1.0
    threading.Timer(4.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
"""


def test_it_ends_although_the_parent_was_killed(start, mark, tmp_path):
    """Each rank carries an alarm."""
    job = start(None, KILLED + RUN, json.dumps([[6, mark, "--hang-at", "1"]]), str(tmp_path))

    assert job.status == -9, job.both
    end = time.monotonic() + 300
    while left_behind(mark) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left_behind(mark)


VERDICT = """
    import sys
    import mpiddl
    from mpiddl.devices.cuda_aware import facts, probe

    facts.driver_version = lambda: "580.1"
    world = mpiddl.init()
    if world.rank == 0:
        verdict = probe.staging_verdict(
            "auto", "an MPI", None, 0, timeout=30.0,
            options=["--host-memory", *sys.argv[1:]],
        )
        print(*verdict)
"""


@pytest.mark.by_day(0)
def test_the_verdict_is_kept_for_the_next_job(start, tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    first = start(1, VERDICT, "--crash-at", "4096", env=cache)
    assert first.out.startswith("no tested: of messages from a rank to itself"), first.both
    assert "up to 1B arrived, then: killed by SIGSEGV" in first.out

    again = start(1, VERDICT, env=cache)
    assert again.out.startswith(first.out.strip()), again.both
    assert "known from" in again.out
    other = start(1, VERDICT, env={**cache, "UCX_TLS": "self,sm,tcp"})
    assert other.out.startswith("yes tested: messages up to 64MiB"), other.both
