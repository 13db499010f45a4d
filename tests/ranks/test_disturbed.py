"""Signals, forks, and what is left behind after thousands of collectives."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import signal
import time
import types
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from cases import NAMES, Case
from matrix import times

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS
from mpiddl.comm.messages import RequestWait
from mpiddl.engine.engine import engine_of
from mpiddl.engine.work import Work
from mpiddl.errors import NotInitializedError

pytestmark = pytest.mark.library


@contextlib.contextmanager
def signals_every(seconds):
    """Counts the alarms that interrupt this process."""
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_signals_during_collectives(world, agree):
    """Handlers run in the middle of them, also in their system calls, and nothing goes wrong."""
    problems, rounds, enough = [], 0, False
    with signals_every(0.001) as seen:
        while not enough:
            for name in NAMES:
                case = Case(name, world, rounds, torch.float32, length=100_000)
                result = case.start(async_=bool(rounds % 2))
                if rounds % 2:
                    result.wait()
                problems += [case.problem()] if case.problem() else []
            rounds += 1
            # Every rank leaves in the same round.
            least = mpiddl.all_reduce(torch.tensor(min(len(seen), 50)), "min")
            enough = int(least) >= 50
    agree(not problems, problems[:3])


def test_a_signal_reaches_its_handler_while_a_collective_waits(world, agree):
    """Rank 0 waits for the others, who wait for its handler to have run."""
    flag = torch.zeros(1)
    sent = []

    def handler(*_):
        sent.append(os.getpid())

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        work = mpiddl.broadcast(flag, async_=True)
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        work.wait()
        mpiddl.barrier()
    finally:
        signal.signal(signal.SIGUSR1, before)
    agree(len(sent) == (world.rank == 0), sent)


def test_a_fork_while_a_collective_is_in_flight(world, agree):
    """The child leaves at once, as those of subprocess do; the parent goes on."""
    cases = [
        Case("all_reduce", world, number, torch.float32, length=200_000) for number in range(4)
    ]
    algorithms = ["ring", "auto", "direct", "doubling"]
    works = [
        case.start(algorithm=algorithm, async_=True)
        for case, algorithm in zip(cases, algorithms, strict=True)
    ]
    child = os.fork()
    if child == 0:
        os._exit(0)
    more = Case("all_to_all", world, 9, torch.int64, length=1000)
    more.start()
    for work in works:
        work.wait()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    agree(status == 0, f"the child ended with {status}")
    problems = [case.problem() for case in [*cases, more] if case.problem()]
    agree(not problems, problems)


def mixed(world, group, count, seed):
    """``count`` collectives of all kinds, blocking and in flight."""
    drawn, works, problem = random.Random(seed), [], ""
    for number in range(count):
        name, where = drawn.choice(NAMES), drawn.choice([world, group])
        length = drawn.choice([0, 1, 10, 300])
        case = Case(name, where, number, torch.float32, length=length)
        rest = {}
        if name == "all_reduce":
            rest["algorithm"] = drawn.choice(["auto", "ring", "direct", "doubling", "library"])
        if drawn.random() < 0.2:
            case.start(**rest)
            problem = problem or case.problem()
        else:
            works.append(case.start(async_=True, **rest))
        if len(works) == 40:
            drawn.shuffle(works)
            for work in works:
                work.wait()
            works.clear()
    for work in works:
        work.wait()
    return problem


def open_files():
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of iterdir itself
            yield str(link.readlink())


def kept():
    """What this process has that a collective could leave behind."""
    gc.collect()
    # Not isinstance(): that asks some objects for more than their type.
    kinds = [type(thing) for thing in gc.get_objects()]
    return {
        "generators": kinds.count(types.GeneratorType),
        "works": kinds.count(Work),
        "requests": kinds.count(RequestWait),
        "open files": len([link for link in open_files() if "standin" not in link]),
        "mapped windows": len(
            re.findall(r"mpiddl-(?!standin)", Path("/proc/self/maps").read_text())
        ),
    }


def more(before, after):
    """What has grown. Other threads have some generators now and then."""
    allowed = {"generators": 4}
    return {
        what: (before[what], after[what])
        for what in before
        if after[what] > before[what] + allowed.get(what, 0)
    }


@pytest.mark.thorough
def test_five_thousand_collectives_leave_nothing(world, agree):
    with world.split(0, key=-world.rank) as group:
        warm_up = mixed(world, group, 500, 1)  # scratch, views and plans that are kept
        before, bytes_before = kept(), psutil.Process().memory_info().rss
        problem = mixed(world, group, times(5000), 2)
        after, grown = kept(), psutil.Process().memory_info().rss - bytes_before

    agree(not problem and not warm_up, problem or warm_up)
    agree(not engine_of(world)._in_flight, "works are in flight")
    agree(not more(before, after), more(before, after))
    agree(grown < 8 << 20, f"{grown / times(5000):.0f} bytes for each collective")


def test_groups_that_reduced_leave_no_shared_memory(world, agree):
    """Each has lanes of some MiB, which go when it closes."""

    def come_and_go(count):
        for _ in range(count):
            with world.split(0) as group:
                mpiddl.all_reduce(torch.ones(3), world=group)
                mpiddl.all_reduce(torch.ones(3), algorithm="ring", async_=True, world=group).wait()

    come_and_go(2)
    before = kept()
    come_and_go(10)
    left = more(before, kept())
    agree(not left, left)


@pytest.mark.parametrize("library", [torch, numpy], ids=["tensor", "array"])
def test_a_work_keeps_what_it_works_on(world, agree, library):
    """The caller may drop both buffer and work: the collective goes on without them."""
    buffer = library.ones(50_000, dtype=library.float32)
    mpiddl.all_reduce(buffer, algorithm="ring", async_=True)
    del buffer
    gc.collect()
    clobber = [torch.full((50_000,), -1.0) for _ in range(8)]
    mpiddl.barrier()
    while engine_of(world)._in_flight:
        engine_of(world).poll()
    agree(all(bool((other == -1).all()) for other in clobber), "somebody else's memory was written")


@pytest.mark.parametrize("where", ["plain", "window"])
@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
def test_inference_mode_comes_and_goes(world, agree, algorithm, where):
    """What is made in that mode is written outside of it, by this collective or the next."""
    length = 999_999 + 2 * len(algorithm)  # nothing is kept yet for buffers of this size
    buffer = mpiddl.empty(length) if where == "window" else torch.empty(length)
    for start, end in [(True, False), (False, True), (True, True), (False, False)]:
        for part in (buffer, buffer[: 1000 + len(algorithm)]):
            part.fill_(world.rank + 1.0)
            with torch.inference_mode(start):
                work = mpiddl.all_reduce(part, "mean", algorithm=algorithm, async_=True)
            with torch.inference_mode(end):
                work.wait()
            agree(bool((part == (world.size + 1) / 2).all()), f"{start} {end}: {part[:5]}")


def test_a_work_of_a_closed_world_raises(world, agree):
    def endless():
        yield types.SimpleNamespace(done=lambda: False)  # as if another rank never came

    group = world.split(0)
    work = engine_of(group).submit(endless(), group)
    group.close()
    with pytest.raises(NotInitializedError, match="closed before"):
        work.wait()
    agree(work.complete)


@pytest.mark.parametrize("length", [3, 3000, 300_000])
@pytest.mark.parametrize("where", ["plain", "window"])
def test_nan_weights_spread(world, agree, where, length):
    buffer = mpiddl.empty(length) if where == "window" else torch.empty(length)
    mpiddl.all_reduce(buffer.fill_(1), pre_scale=float("nan") if world.rank == 0 else 1.0)
    agree(bool(buffer.isnan().all()), buffer[:5])


def test_late_ranks_find_the_others_waiting(world, agree):
    """Blocking calls that outlast their patience, in both turns, in memory of both kinds."""
    for turn in range(6):
        for buffer in (torch.empty(100), torch.empty(50_000), mpiddl.empty(50_000)):
            buffer.fill_(world.rank + 1.0)
            if turn % world.size == world.rank:
                time.sleep(0.01)  # late on purpose
            mpiddl.all_reduce(buffer)
            want = world.size * (world.size + 1) / 2
            agree(bool((buffer == want).all()), f"{turn} {len(buffer)}: {buffer[:5]}")
