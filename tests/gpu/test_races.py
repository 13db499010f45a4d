"""Slow kernels before a collective and behind it: nobody reads or writes too early."""

from __future__ import annotations

import gc

import pytest
import torch
from cases import NAMES, Case
from samples import buffer_of, expected
from slow import CYCLES, stream_after_this, written_late

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS, choose
from mpiddl.collectives.nccl import nccl_missing
from mpiddl.errors import UnsupportedBufferError

ROUNDS = 5


def on_gpu(world, name, seed, length, dtype=torch.float32):
    with torch.device(world.device):
        return Case(name, world, seed, dtype, length=length)


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [3, 30_000])
def test_every_collective(world, agree, name, length, side):
    for seed in range(ROUNDS):
        case = on_gpu(world, name, seed, length)
        with torch.cuda.stream(stream_after_this() if side else torch.cuda.current_stream()):
            for _, tensor, _ in case.must_hold:
                written_late(tensor)
            case.start()
            problem = case.problem()
        agree(not problem, problem)


def in_memory(world, where, length):
    return (
        mpiddl.empty(length, device=world.device)
        if where == "window"
        else torch.empty(length, device=world.device)
    )


def usable(world, gpu, algorithm, where):
    """Skips what is refused."""
    if ALGORITHMS[algorithm].reach and where == "plain":
        pytest.skip("works on memory that is mapped")
    if ALGORITHMS[algorithm].gpu and (problem := nccl_missing()):
        pytest.skip(problem)
    try:
        choose(algorithm, torch.float32, 4, world, device=gpu, mapped=where == "window")
    except UnsupportedBufferError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("length", [3, 300_000, 3_000_000])
@pytest.mark.parametrize("where", ["plain", "window"])
def test_every_algorithm(world, agree, gpu, algorithm, length, where):
    """A writer is late before it, and so is a reader that must see what was there before."""
    usable(world, gpu, algorithm, where)
    with torch.device(world.device):
        mine = buffer_of(world.rank, length, torch.float32)
        want = expected("sum", world.size, length, torch.float32) / 2
    buffer = in_memory(world, where, length)
    for turn in range(ROUNDS):
        with torch.cuda.stream(stream_after_this()):
            buffer.copy_(mine)
            written_late(buffer)
            torch.cuda._sleep(CYCLES if turn % 2 else 1)
            before = buffer.clone()
            work = mpiddl.all_reduce(
                buffer, "sum", algorithm=algorithm, post_scale=0.5, async_=bool(turn % 2)
            )
            if turn % 2:
                work.wait()
            after = buffer.clone()
            kept, right = torch.equal(before, mine), torch.equal(after, want)
        agree(kept, f"{turn}: written over while it was read: {before[:5]}, not {mine[:5]}")
        agree(right, f"{turn}: {after[:5]}, not {want[:5]}")


def test_started_on_one_stream_and_waited_for_on_another(world, agree):
    first, second = stream_after_this(), stream_after_this()
    for length in (5, 100_000) * ROUNDS:
        with torch.cuda.stream(first):
            buffer = torch.full((length,), world.rank + 1.0, device=world.device)
            written_late(buffer)
            work = mpiddl.all_reduce(buffer, async_=True)
        with torch.cuda.stream(second):
            work.wait()
            right = bool((buffer == world.size * (world.size + 1) / 2).all())
        agree(right, buffer[:5])


def test_one_after_the_other_without_waiting_in_between(world, agree):
    tensor = torch.full((4000,), float(world.rank), device=world.device)
    for _ in range(20):
        mpiddl.all_reduce(tensor, "mean")
        torch.cuda._sleep(CYCLES // 10)
        tensor.add_(world.rank)
    mean = (world.size - 1) / 2
    agree(torch.allclose(tensor, torch.full_like(tensor, 20 * mean + world.rank)), tensor[:3])


def test_many_messages_of_one_tag_at_once(world, agree):
    """The note of one must not come before what an earlier one carries."""
    if world.size == 1:
        pytest.skip("nobody to talk to")
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    lengths = (2_500_000, 7, 16, 30_000) * ROUNDS
    mine = [torch.full((n,), float(world.rank + n), device=world.device) for n in lengths]
    theirs = [torch.full((n,), -1.0, device=world.device) for n in lengths]
    for tensor in mine:
        written_late(tensor, CYCLES // 10)
    works = [mpiddl.send(tensor, right, async_=True) for tensor in mine]
    works += [mpiddl.recv(tensor, left, async_=True) for tensor in theirs]
    for work in works:
        work.wait()
    right_ones = [bool((t == left + n).all()) for t, n in zip(theirs, lengths, strict=True)]
    agree(all(right_ones), right_ones)


def test_many_in_flight_whose_writers_are_late(world, agree):
    cases = [on_gpu(world, NAMES[n % len(NAMES)], n, 2000 * (n % 5)) for n in range(60)]
    works = []
    for case in cases:
        for _, tensor, _ in case.must_hold:
            written_late(tensor, CYCLES // 20)
        works.append(case.start(async_=True))
    for work in works:
        work.wait()
    problems = [case.problem() for case in cases if case.problem()]
    agree(not problems, problems[:3])


def test_a_buffer_that_is_dropped_is_not_given_to_others(world, agree):
    """torch would hand its memory to whoever asks next, on the same stream, at once."""
    for _ in range(ROUNDS):
        buffer = torch.ones(500_000, device=world.device)
        written_late(buffer)
        mpiddl.all_reduce(buffer, algorithm="ring", async_=True)
        del buffer
        gc.collect()
        others = [torch.full((500_000,), -1.0, device=world.device) for _ in range(4)]
        mpiddl.all_reduce(torch.ones(3, device=world.device))
        agree(all(bool((other == -1).all()) for other in others), "memory of others was written")
