"""A host that runs ahead of its GPU: buckets become ready long before their gradients are there.

On a stand-in for a GPU, whose gradients the test itself lets come.
"""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

import mpiddl

pytestmark = pytest.mark.thorough

WIDTH = 64
SOON = 100.0
"""Seconds, within which something happens that nothing holds up."""


def happens(condition):
    until = time.monotonic() + SOON
    while not condition() and time.monotonic() < until:
        time.sleep(1e-4)
    return condition()


class Gated:
    """A model of two buckets, each with a gradient that comes when its gate is opened, on a stream
    of its own."""

    def __init__(self, world, runtime, **options):
        self.runtime = runtime
        self.streams = [runtime.make_stream() for _ in range(2)]
        self.gates = [threading.Event() for _ in range(2)]
        self.during = None  # what a thread does once both buckets are in flight
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        )
        for number, layer in enumerate(reversed(self.layers)):  # as backward reaches them
            layer.weight.register_post_accumulate_grad_hook(self._hook(number))
        self.model = mpiddl.DataParallel(
            self.layers, bucket_size=WIDTH * WIDTH * 4, broadcast_buffers=False, **options
        )
        self.inputs = torch.full((2, WIDTH), float(world.rank + 1))
        for _ in range(2):  # after which gradients are views, and stay where they are
            self.backward()
        self.want = [parameter.grad.clone() for parameter in self.layers.parameters()]

    def _hook(self, number):
        def comes_late(parameter):
            if self.during is None:
                return
            stream, gate = self.streams[number], self.gates[number]
            self.runtime._caller = stream
            value = parameter.grad.clone()
            parameter.grad.fill_(77)
            self.runtime.ask(stream, lambda: (gate.wait(), parameter.grad.copy_(value)))
            if number == 1:
                threading.Thread(target=self._once_in_flight, args=(self.during,)).start()

        return comes_late

    def _once_in_flight(self, during):
        happens(lambda: self.works[1] is not None)
        during()
        for gate in self.gates:
            gate.set()

    @property
    def works(self):
        return self.model.strategy.scheduler.works

    def backward(self, during=None):
        self.model.zero_grad(set_to_none=False)
        for gate in self.gates:
            gate.clear()
        self.during = during
        try:
            self.model(self.inputs).sum().backward()
        finally:
            self.during, self.runtime._caller = None, 0
        for stream in self.streams:
            self.runtime.drain(stream)

    @property
    def right(self):
        pairs = zip(self.layers.parameters(), self.want, strict=True)
        return all(torch.equal(parameter.grad, want) for parameter, want in pairs)


def in_half(_state, bucket):
    half = bucket.buffer / 2
    yield from bucket.all_reduce(half, weight=bucket.weight)
    bucket.buffer.copy_(half * 2)


@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize(
    ("algorithm", "hook"),
    [(name, None) for name in ("shared", "ring", "direct", "doubling", "reference", "library")]
    + [("ring", in_half), ("library", in_half)],
)
def test_a_bucket_does_not_wait_for_gradients_that_come_later(
    world, agree, device, engine, algorithm, hook
):
    """By the time its own gradients are there, the host has asked for all that follows."""
    if world.size == 1:
        pytest.skip("nobody to exchange with")
    gated = Gated(world, device.runtime, engine=engine, algorithm=algorithm)
    if hook is not None:
        gated.model.register_comm_hook(None, hook)
    seen = []

    def during():
        gated.gates[0].set()
        seen.append(happens(lambda: gated.works[0].complete))
        seen.append(not gated.works[1].complete)

    gated.backward(during)
    agree(seen == [True, True], "the first bucket waited for the second one's gradients")
    agree(gated.right)
    gated.model.unwrap()


@pytest.mark.parametrize("hook", [None, in_half])
def test_what_a_library_runs_begins_in_order(world, agree, device, hook):
    """Its calls match by their order, and gradients come in another one on each rank."""
    gated = Gated(world, device.runtime, engine="inline", algorithm="library")
    if hook is not None:
        gated.model.register_comm_hook(None, hook)

    def during():
        gated.gates[world.rank % 2].set()
        time.sleep(0.05)

    gated.backward(during)
    agree(gated.right)
    gated.model.unwrap()


def calls_from_two_streams(world, runtime, count):
    """Numbers, to make a call for each: now from one stream, now from the other, of which one is
    late, another one on each rank."""
    streams = [runtime.make_stream() for _ in range(2)]
    runtime.ask(streams[world.rank % 2], lambda: None, 0.1)
    for number in range(count):
        with runtime.calling_from(streams[(number + number // 4) % 2]):  # there are four lanes
            yield number


@pytest.mark.parametrize("how", ["library", "shared", "hierarchical", "ring"])
def test_works_meet_those_of_the_same_call(world, agree, device, how):
    """Libraries and lanes match collectives by their order, and they begin in another one."""
    works, buffers = [], mpiddl.empty((15, 100))
    for number, buffer in enumerate(buffers):
        buffer.fill_(2.0**number)
    for number in calls_from_two_streams(world, device.runtime, len(buffers)):
        works.append(mpiddl.all_reduce(buffers[number], algorithm=how, async_=True))
    for work in works:
        work.wait()
    got = [float(buffer[0]) / world.size for buffer in buffers]
    agree(got == [2.0**number for number in range(15)], got)


def test_messages_of_one_tag_keep_their_order(world, agree, device):
    if world.size == 1:
        pytest.skip("nobody to talk to")
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    mine = [torch.full((100,), float(number)) for number in range(6)]
    theirs, works = [torch.full((100,), -1.0) for _ in mine], []
    for number in calls_from_two_streams(world, device.runtime, len(mine)):
        works.append(mpiddl.send(mine[number], right, async_=True))
        works.append(mpiddl.recv(theirs[number], left, async_=True))
    for work in works:
        work.wait()
    agree([float(tensor[0]) for tensor in theirs] == [0, 1, 2, 3, 4, 5], theirs)


@pytest.mark.parametrize("algorithm", ["shared", "ring", "direct", "reference", "library"])
@pytest.mark.parametrize("engine", ["inline", "thread", "after"])
def test_one_rank_does_not_wait_for_its_gpu(world, agree, device, algorithm, engine):
    if world.size > 1:
        pytest.skip("ranks exchange gradients when they are there")
    gated = Gated(world, device.runtime, engine=engine, algorithm=algorithm)
    seen = []
    gated.backward(during=lambda: seen.append(happens(lambda: gated.during is None)))
    agree(seen == [True], "backward did not return before the gradients were there")
    agree(gated.right)
    gated.model.unwrap()


def test_what_the_gpu_still_computes_is_not_exposed(world, agree, device):
    if world.size == 1:
        pytest.skip("nobody to exchange with")
    gated = Gated(world, device.runtime, engine="inline", algorithm="ring")
    before = copy.deepcopy(gated.model.stats())
    began = time.perf_counter()
    gated.backward(during=lambda: time.sleep(0.3))
    others = time.perf_counter() - began - 0.3  # whatever took how long: not the GPU
    stats = gated.model.stats()
    exposed = stats.exposed_seconds - before.exposed_seconds
    computed = stats.compute_seconds - before.compute_seconds
    waited = sum(bucket.exposed_seconds for bucket in stats.buckets)
    waited -= sum(bucket.exposed_seconds for bucket in before.buckets)
    agree(computed >= 0.3, f"{computed} s computed")
    agree(exposed <= others and waited <= others, f"{exposed} and {waited} of {others} s")
    gated.model.unwrap()


def test_what_comes_behind_the_gradients_is_exposed(world, agree, device):
    if world.size == 1:
        pytest.skip("nobody to exchange with")
    gated = Gated(world, device.runtime, engine="inline", algorithm="ring")
    before = gated.model.stats().exposed_seconds
    device.runtime.lag = 0.05  # of each sum
    try:
        gated.backward(during=lambda: None)
    finally:
        device.runtime.lag = 0.0
    exposed = gated.model.stats().exposed_seconds - before
    agree(exposed > 0.04, f"{exposed} s exposed")
    agree(gated.right)
    gated.model.unwrap()
