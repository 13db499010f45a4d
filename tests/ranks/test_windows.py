"""Memory that the ranks of a node share: where it is, how long it lives, what is reduced in it."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch
from samples import buffer_of, expected, seeded

import mpiddl
from mpiddl.collectives.channel import MessageChannel
from mpiddl.collectives.choose import ALGORITHMS
from mpiddl.collectives.node.lanes import kept_lanes, place_of
from mpiddl.collectives.reduction import DTYPES, Reduction
from mpiddl.devices.host import HOST
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import engine_of
from mpiddl.errors import MismatchError, UnsupportedBufferError

pytestmark = [pytest.mark.layout, pytest.mark.library, pytest.mark.device]

UNORDERED = [name for name, algorithm in ALGORITHMS.items() if not algorithm.ordered]


@pytest.fixture(autouse=True, scope="module")
def _one_node(world):
    if world.num_nodes > 1:
        pytest.skip("windows are within one node")


def mapped():
    """Windows that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/mpiddl-")


@pytest.fixture(params=["window", "plain", "mixed"])
def place(request, world):
    """Makes a filled buffer: in a window, not, or in one on odd ranks only."""

    def make(length, dtype):
        shared = mpiddl.empty(length, dtype)
        in_window = request.param == "window" or (request.param == "mixed" and world.rank % 2)
        buffer = shared if in_window else torch.empty(length, dtype=dtype)
        return buffer.copy_(buffer_of(world.rank, length, dtype))

    return make


def test_empty_is_what_was_asked_for(world, agree):
    for shape, dtype in ((5, torch.float32), ((2, 0, 3), torch.int8), ((4, 6), torch.bfloat16)):
        tensor = mpiddl.empty(shape, dtype)
        agree(tensor.shape == torch.empty(shape).shape and tensor.dtype == dtype, shape)
        tensor.fill_(world.rank)
        agree(bool((tensor == world.rank).all()), "another rank's memory")


def test_empty_is_in_a_window(world, agree):
    tensor, private = mpiddl.empty(1000), torch.empty(1000)
    device = device_of(tensor)
    shared = world.size > 1 or device.late
    agree((place_of(world, tensor[3:], device).window > 0) == shared)
    agree(place_of(world, tensor[3:], device).offset == (12 if shared else 0))
    agree(place_of(world, private, device).window == 0)


def test_what_is_behind_a_part_is_not_found(world, agree):
    window = world.windows.allocate(100)
    start = ctypes.addressof(ctypes.c_char.from_buffer(window.memory))
    first, last = (start + (world.rank + part) * window.part_bytes for part in (0, 1))
    agree(world.windows.find(first) == (window.number, 0))
    agree(world.windows.find(last - 1) == (window.number, window.part_bytes - 1))
    for outside in (first - 1, last, last + (1 << 40)):  # another window may be there
        agree(world.windows.find(outside)[0] != window.number, outside - first)


@pytest.mark.host
def test_memory_lives_as_long_as_a_view_of_it(world, agree):
    gc.collect()
    before = mapped()
    tensor = mpiddl.empty(100_000)
    view = tensor[10:20].view(2, 5).numpy()
    del tensor
    agree(mapped() == before + (world.size > 1), "unmapped while a view lives")
    mpiddl.all_reduce(view.fill(1) or view)
    agree(bool((view == world.size).all()))
    del view
    gc.collect()
    agree(mapped() == before, "still mapped")
    again = mpiddl.empty(100_000)  # maybe at the same address
    mpiddl.all_reduce(again.fill_(2))
    agree(bool((again == 2 * world.size).all()))


def test_different_shapes_are_an_error_on_every_rank(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    with pytest.raises(MismatchError, match="same shape and dtype"):
        mpiddl.empty(100_000 * (world.rank + 1))
    with pytest.raises(UnsupportedBufferError, match="cannot be reduced"):
        mpiddl.empty(3, torch.complex64)
    with pytest.raises(ValueError, match="negative"):
        mpiddl.empty((3, -1))
    mpiddl.barrier()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 1000, 20_000, 100_000, 700_001])
def test_shared_is_right_wherever_buffers_are(world, agree, place, dtype, length):
    for op in ("sum", "max"):
        buffer = place(length, dtype)
        mpiddl.all_reduce(buffer, op, algorithm="shared")
        want = expected(op, world.size, length, dtype)
        agree(torch.equal(buffer, want), f"{op}: {buffer[:9]}, not {want[:9]}")


@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "prod"])
@pytest.mark.parametrize("length", [1, 3000, 4097, 40_000, 300_000])
def test_the_short_way_and_the_long_way_meet(world, agree, place, op, length):
    """One rank has something in flight and takes the long way, the others the short one."""
    other = torch.ones(7)
    for _ in range(3):
        buffer = place(length, torch.float32)
        works = []
        if world.rank == 0:
            works.append(mpiddl.all_reduce(other, async_=True))
            mpiddl.all_reduce(buffer, op)
        else:
            works.append(mpiddl.all_reduce(other, async_=True))
            works[0].wait()
            mpiddl.all_reduce(buffer, op)
        works[0].wait()
        want = expected("sum" if op == "mean" else op, world.size, length, torch.float32)
        want = want / world.size if op == "mean" else want
        agree(torch.allclose(buffer, want, rtol=1e-6), f"{buffer[:9]}, not {want[:9]}")


@pytest.mark.parametrize("algorithm", ["shared", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_bits_do_not_depend_on_places(world, agree, algorithm, dtype, op):
    """Whole or in parts, in a window or not: each element is the same to the last bit."""
    length = 300_001
    generator = seeded(world.rank)
    values = torch.randn(length, generator=generator).to(dtype)
    whole = values.clone()
    mpiddl.all_reduce(whole, op, algorithm=algorithm)
    parted, shared = values.clone(), mpiddl.empty(length, dtype).copy_(values)
    for first, last in ((0, 5), (5, 9000), (9000, 50_001), (50_001, length)):
        mpiddl.all_reduce(parted[first:last], op, algorithm=algorithm)
    mpiddl.all_reduce(shared, op, algorithm=algorithm)
    agree(torch.equal(whole, parted), "parts differ")
    agree(torch.equal(whole, shared), "windows differ")


@pytest.fixture
def channels(world):
    """Two places of their own, as buckets have them."""
    tags = world.tags.keep(2)
    lanes = kept_lanes(world, 2)
    yield [MessageChannel(world, tag, lane=lane) for tag, lane in zip(tags, lanes, strict=True)]
    world.tags.give_back(tags)


@pytest.mark.parametrize("algorithm", UNORDERED)
@pytest.mark.parametrize("length", [100, 300_000])
def test_opposite_orders_on_different_ranks(world, agree, channels, algorithm, length):
    """Buckets become ready in any order on any rank, whatever they wait for."""
    engine = engine_of(world)
    buffers = [buffer_of(world.rank, length, torch.float32) for _ in range(2)]

    def start(number):
        run = ALGORITHMS[algorithm].run
        device = device_of(buffers[number])
        waits = run(buffers[number], Reduction("sum"), channels[number], device, 4096)
        return engine.submit(waits, world, device=device)

    first = world.rank % 2
    for number in (first, 1 - first):
        start(number).wait() if world.size == 1 else None
    works = [start(number) for number in (first, 1 - first)] if world.size > 1 else []
    for work in works:
        work.wait()
    want = expected("sum", world.size, length, torch.float32)
    agree(all(torch.equal(buffer, want) for buffer in buffers))


@pytest.mark.parametrize("algorithm", UNORDERED)
def test_a_users_collective_while_a_bucket_waits_for_a_late_rank(world, agree, channels, algorithm):
    length = 300_000
    late = world.size - 1
    bucket = buffer_of(world.rank, length, torch.float32)
    engine = engine_of(world)

    def start():
        run = ALGORITHMS[algorithm].run
        device = device_of(bucket)
        waits = run(bucket, Reduction("sum"), channels[0], device, 4096)
        return engine.submit(waits, world, device=device)

    work = None if world.rank == late else start()
    for size in (10, 50_000, length):
        own = buffer_of(world.rank, size, torch.float32)
        mpiddl.all_reduce(own)
        agree(torch.equal(own, expected("sum", world.size, size, torch.float32)), size)
    work = work or start()
    work.wait()
    agree(torch.equal(bucket, expected("sum", world.size, length, torch.float32)))


@pytest.mark.host
def test_memory_that_is_claimed_has_no_name_any_more(world, agree, monkeypatch):
    """A rank that is killed for want of memory dies there, and must leave nothing behind."""
    claim, links = os.posix_fallocate, []

    def claim_and_look(handle, start, nbytes):
        links.append(os.fstat(handle).st_nlink)
        claim(handle, start, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", claim_and_look)
    mpiddl.empty(1000)
    agree(links == [0] * (world.size > 1), links)


@pytest.mark.host
def test_whatever_adds_holds_the_lock(world, agree, monkeypatch):
    """Scratch is not for two threads, and the engine's may add at the same time."""
    engine, scratch, held = engine_of(world), HOST.scratch, []

    def scratch_and_look(*arguments):
        held.append(engine._lock.locked())
        return scratch(*arguments)

    monkeypatch.setattr(HOST, "scratch", scratch_and_look)
    for tensor in (torch.ones(10, dtype=torch.bfloat16), mpiddl.empty(10_000, torch.bfloat16)):
        for _ in range(3):
            mpiddl.all_reduce(tensor.fill_(1), "mean")  # added in float32, which takes scratch
    agree(all(held) and len(held) >= (6 if world.size > 1 else 0), held)
