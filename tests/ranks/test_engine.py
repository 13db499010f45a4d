"""Every bucket in flight, no agreed order, and nothing waits for what is late."""

from __future__ import annotations

import os
import random
import threading

import pytest
import torch
from mpi4py import MPI
from samples import buffer_of, expected

import mpiddl
from mpiddl.base.waits import ALREADY
from mpiddl.collectives.barrier import barrier
from mpiddl.collectives.channel import MessageChannel
from mpiddl.collectives.reduction import Reduction
from mpiddl.collectives.ring import ring_all_reduce
from mpiddl.comm.messages import Credits
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import Engine
from mpiddl.engine.work import Work

pytestmark = [pytest.mark.layout, pytest.mark.device]

CHUNK_BYTES = 512


@pytest.fixture(params=["inline", "thread"])
def engine(request, world):
    """An engine of its own; the world's is idle meanwhile, so that MPI has one caller."""
    engine = Engine(threaded=request.param == "thread")
    yield engine
    engine.stop()


class Held:
    """A wait that this test lets go."""

    def __init__(self):
        self.released = False

    def done(self):
        return self.released


def reduction(world, tag, buffer, before=None):
    """The ring; ``before`` is waited for first."""
    if before is not None:
        yield before
    channel = MessageChannel(world, tag)
    yield from ring_all_reduce(buffer, Reduction("sum"), channel, device_of(buffer), CHUNK_BYTES)


def submit(engine, world, tag, buffer, before=None):
    """Start that: a GPU's stream takes over from the caller's."""
    waits = reduction(world, tag, buffer, before)
    return engine.submit(waits, world, device=device_of(buffer))


def wait_for(works):
    """Until all are complete, and the caller's stream may use what they reduced."""
    for work in works:
        work.wait()


@pytest.mark.parametrize("seed", range(10))
def test_another_ready_order_on_every_rank(world, agree, engine, seed):
    lengths = [0, 1, 50, 1000, 3000, 7, 5000, 2]
    tags = world.tags.keep(len(lengths))
    buffers = [buffer_of(world.rank, length, torch.float32) for length in lengths]
    order = random.Random(f"{seed} {world.rank}").sample(range(len(lengths)), len(lengths))

    works = [submit(engine, world, tags[n], buffers[n]) for n in order]
    engine.drive(works)
    wait_for(works)

    for number, length in enumerate(lengths):
        want = expected("sum", world.size, length, torch.float32)
        agree(torch.equal(buffers[number], want), f"bucket {number}")


def test_a_later_bucket_completes_while_an_earlier_is_held_back(world, agree, engine):
    """Rank 0 does not start bucket 0 before bucket 1 is complete on every rank."""
    tags = world.tags.keep(2)
    early, late = (buffer_of(world.rank, 2000, torch.float32) for _ in range(2))
    gate = Held()
    first = submit(engine, world, tags[0], early, gate if world.rank == 0 else None)
    second = submit(engine, world, tags[1], late)

    second.wait()
    want = expected("sum", world.size, 2000, torch.float32)
    agree(torch.equal(late, want), "the later bucket is wrong")
    agree(world.rank != 0 or not first.complete, "the earlier bucket was not held back")
    agree(world.size == 1 or not first.complete or world.rank == 0, "complete without rank 0")

    gate.released = True
    first.wait()
    agree(torch.equal(early, want), "the earlier bucket is wrong")


def test_a_foreground_collective_while_a_bucket_waits(world, agree):
    """The last rank starts its bucket only after a blocking call that all ranks make."""
    tag = world.tags.keep(1)[0]
    bucket = buffer_of(world.rank, 3000, torch.float32)
    engine = mpiddl.engine.engine.engine_of(world)
    works = []
    if world.rank != world.size - 1:
        works.append(submit(engine, world, tag, bucket))
    total = torch.ones(10)

    mpiddl.all_reduce(total)
    if not works:
        works.append(submit(engine, world, tag, bucket))
    engine.drive(works)
    wait_for(works)

    agree(torch.equal(total, torch.full((10,), float(world.size))), total)
    agree(torch.equal(bucket, expected("sum", world.size, 3000, torch.float32)))


def test_a_thread_goes_on_while_the_main_thread_computes(world, agree):
    """The main thread never polls: only the engine's own thread can complete this."""
    engine = Engine(threaded=True)
    buffer = buffer_of(world.rank, 5000, torch.float32)

    work = submit(engine, world, world.tags.keep(1)[0], buffer)
    while not work.complete:
        torch.ones(10).sum()

    wait_for([work])
    agree(torch.equal(buffer, expected("sum", world.size, 5000, torch.float32)))
    MPI.COMM_WORLD.Barrier()
    engine.stop()


def test_an_error_in_a_collective_is_raised_by_wait(world, agree, engine):
    def broken():
        yield from ()
        raise RuntimeError("broken on purpose")

    work = engine.submit(broken(), world)
    with pytest.raises(RuntimeError, match="on purpose"):
        work.wait()
    agree(work.done())


def test_driving_from_two_threads(world, agree):
    """Calls from several threads take turns; each gets its own result."""
    group = world.split(0)
    results = {}

    def call(number):
        work = works[number]
        results[number] = work.wait()

    works = [
        mpiddl.all_reduce(buffer_of(world.rank, 500, torch.float32), async_=True, world=group)
        for _ in range(4)
    ]
    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    want = expected("sum", world.size, 500, torch.float32)
    agree(all(torch.equal(result, want) for result in results.values()) and len(results) == 4)
    group.close()


def test_two_worlds_waited_for_in_opposite_orders(world, agree):
    """Whoever waits helps all worlds on, so this cannot deadlock."""
    group = world.split(0)
    one, other = torch.ones(2000), torch.ones(3000)
    work = mpiddl.all_reduce(one, async_=True, world=group)
    if world.rank % 2:
        work.wait()
    mpiddl.all_reduce(other)
    work.wait()

    agree(one[0] == other[-1] == world.size)
    group.close()


def test_a_thread_gets_its_result_while_another_waits(world, agree):
    """One thread waits for a work that completes only after another thread's is done."""
    tags = world.tags.keep(1)
    driver = Engine()
    gate = Held()
    buffer = buffer_of(world.rank, 100, torch.float32)
    held = submit(driver, world, tags[0], buffer, gate)
    waiting = threading.Thread(target=held.wait)
    waiting.start()

    driver.run(barrier(MessageChannel(world, world.tags.keep(1)[0])), world)
    gate.released = True
    waiting.join(timeout=300)

    agree(not waiting.is_alive(), "the thread hangs")
    agree(torch.equal(buffer, expected("sum", world.size, 100, torch.float32)))


def test_ctrl_c_in_a_collective_is_no_completion(world, agree):
    class Interrupted:
        def done(self):
            raise KeyboardInterrupt

    def interrupted():
        yield Interrupted()

    driver = Engine()
    with pytest.raises(KeyboardInterrupt):
        driver.submit(interrupted(), world).wait()
    work = driver.run(barrier(MessageChannel(world, world.tags.keep(1)[0])), world)
    agree(work is None and not driver._in_flight, "the interrupted work is still there")


def test_inference_tensors_in_the_engines_thread(world, agree):
    driver = Engine(threaded=True)
    with torch.inference_mode():
        buffer = buffer_of(world.rank, 1000, torch.float32)
        submit(driver, world, world.tags.keep(1)[0], buffer).wait()
        agree(torch.equal(buffer, expected("sum", world.size, 1000, torch.float32)))
    driver.stop()


def test_who_is_crowded(world, agree):
    cores = os.sched_getaffinity(0)  # of every rank of the node: launchers do not bind in tests
    agree(world.layout.crowded == (world.local_size > len(cores)), cores)


def test_a_free_credit_goes_to_the_most_urgent(world, agree):
    """Two collectives want to send more than there are credits; the later one is more urgent."""
    room, driver = Credits(1), Engine()
    channel = MessageChannel(world, 0, room=room)
    posted, sends = [], []

    def sending(name, count):
        for _ in range(count):
            yield channel.room_after([Held()])
            sends.append(Held())
            room.take(sends[-1])
            posted.append(name)

    driver.submit(sending("large", 3), world)
    driver.submit(sending("urgent", 2), world, priority=1)
    while len(posted) < 5:
        sends[-1].released = True
        driver.poll()

    agree(posted == ["large", "urgent", "urgent", "large", "large"], posted)


def test_buckets_under_way_are_known_by_their_urgency(world, agree):
    model = mpiddl.DataParallel(torch.nn.Linear(30, 30), bucket_size=1000)
    room, seen = model.strategy.reductions._credits, []

    def hook(state, bucket):
        seen.append(room.first >= bucket.number)
        yield from bucket.all_reduce(bucket.buffer, weight=bucket.weight)

    model.register_comm_hook(None, hook)
    model(torch.ones(2, 30)).sum().backward()
    agree(len(seen) > 2 and all(seen) and room.first == -1, seen)


def test_an_urgent_collective_is_asked_while_a_large_one_goes_on(world, agree):
    """It does not wait for a turn of every large one."""
    gate, driver, turns = Held(), Engine(), []

    def large():
        for turn in range(200):
            turns.append(turn)
            if turn == 100 and not gate.released:
                gate.released = True
                driver._submitted.append(Work(driver, urgent(), world, priority=2))
            yield ALREADY

    def urgent():
        yield gate
        turns.append("urgent")

    driver._submitted.append(Work(driver, urgent(), world, priority=1))
    driver._submitted.extend(Work(driver, large(), world) for _ in range(3))
    while len(turns) < 602:
        driver.poll()

    released = turns.index(100)
    places = [place for place, turn in enumerate(turns) if turn == "urgent"]
    agree(released < places[0] < places[1] < released + 20, [released, *places])


def test_an_urgent_bucket_overtakes_a_large_one_in_the_middle(world, agree, engine):
    if world.size == 1:
        pytest.skip("nothing is sent")
    tags, gate, room = world.tags.keep(2), Held(), Credits(4)
    large, small = (buffer_of(world.rank, length, torch.float32) for length in (300_000, 300))
    complete = []

    def reducing(tag, buffer, gate=None):
        channel = MessageChannel(world, tag, room=room)
        device = device_of(buffer)
        waits = ring_all_reduce(buffer, Reduction("sum"), channel, device, CHUNK_BYTES)
        for turn, wait in enumerate(waits):
            if turn == 100 and gate is not None:
                yield gate
            yield wait
        complete.append(len(buffer))

    first = engine.submit(reducing(tags[0], large, gate), world, device=device_of(large))
    MPI.COMM_WORLD.Barrier()
    second = engine.submit(reducing(tags[1], small), world, priority=1, device=device_of(small))
    MPI.COMM_WORLD.Barrier()  # both are under way on every rank
    gate.released = True
    second.wait()
    first.wait()

    agree(complete == [300, 300_000], complete)
    for buffer in (large, small):
        agree(torch.equal(buffer, expected("sum", world.size, len(buffer), torch.float32)))
