"""A collective that is given up in the middle: its memory lives until nobody writes there."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from standin import in_place_of_the_host

import mpiddl
from mpiddl.comm.kept import forget_one
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import engine_of

LENGTH = 50_000
"""More than small: ``shared`` then writes to other ranks' memory."""
ROUNDS = 20
"""Of messages after which all that was on its way has come."""

CALLS = {
    name: lambda tensor, group, name=name: mpiddl.all_reduce(
        tensor, algorithm=name, async_=True, world=group
    )
    for name in ("ring", "direct", "doubling", "shared")
} | {
    "broadcast": lambda tensor, group: mpiddl.broadcast(tensor, 1, async_=True, world=group),
    "recv": lambda tensor, group: (
        mpiddl.recv(tensor, 1, async_=True, world=group)
        if group.rank == 0
        else mpiddl.send(tensor, 0, async_=True, world=group)
    ),
}


def begin(call, tensor, group):
    """Start it, and help it on until it waits for other ranks."""
    work, device = CALLS[call](tensor, group), device_of(tensor)
    for _ in range(3):
        while not device.fence().done():
            work.done()
        work.done()
    return work


def occupy():
    """Memory that the allocator has just got back, in whatever sizes, with something in it."""
    sizes = [2**power for power in range(6, 19)] + [4 * LENGTH]
    return [torch.full((size // 4,), 7.0) for size in sizes for _ in range(16)]


def give_up(group):
    """What closing a world does with that which nobody waited for."""
    engine_of(group).abandon(group)
    gc.collect()


@pytest.mark.parametrize("call", CALLS)
def test_others_do_not_write_into_somebody_elses_memory(world, agree, call):
    if world.size == 1:
        pytest.skip("nobody else")
    group = world.split(0)
    if world.rank == 0:
        begin(call, torch.zeros(LENGTH), group)
        give_up(group)
        theirs = occupy()
    agree(True)

    if world.rank > 0:
        work = begin(call, torch.ones(LENGTH), group)
    for _ in range(ROUNDS):
        if world.rank > 0:
            work.done()
        agree(True)

    untouched = world.rank > 0 or all(bool((tensor == 7).all()) for tensor in theirs)
    agree(untouched, "what was received after the end was written to memory of others")
    give_up(group)
    group.close()


class Never:
    def done(self):
        return False


@contextmanager
def held_up(device, stream):
    """What ``stream`` is asked from now on it does after the block."""
    gate = threading.Event()
    device.runtime.ask(stream, gate.wait)
    try:
        yield
    finally:
        gate.set()
        device.runtime.drain(stream)


def is_kept(memory):
    gc.collect()
    for _ in range(1000):  # whatever else is kept
        forget_one()
    return memory() is not None


def test_a_gpu_goes_on_with_what_was_given_up(world, agree):
    with in_place_of_the_host(world) as device:
        memory = []

        def work_on_it():
            mine = torch.ones(1000)
            memory.append(weakref.ref(mine))
            device.scale(mine, 2.0)
            yield Never()

        group = world.split(0)
        with held_up(device, device._stream):
            engine_of(group).submit(work_on_it(), group, device=device)
            while not memory:
                engine_of(group).poll()
            give_up(group)
            agree(is_kept(memory[0]))
        agree(not is_kept(memory[0]))
        group.close()


def test_a_gpu_copies_what_was_received_into_memory_that_lives(world, agree):
    with in_place_of_the_host(world, staging="host") as device:
        mine, theirs, messages = torch.zeros(1000), torch.ones(1000), device.messages(world)
        memory, stage = weakref.ref(mine), device._stage
        with held_up(device, stage._in):
            sent = messages.send(theirs.data_ptr(), 4000, world.rank, 0, theirs)
            arrived = messages.receive(mine.data_ptr(), 4000, world.rank, 0, mine)
            while not sent.done() or not arrived._copied:
                arrived.done()
            device._forget(world)  # as the end of a world does
            del mine, sent, arrived, messages
            agree(is_kept(memory))
        agree(not is_kept(memory))
