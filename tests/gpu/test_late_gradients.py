"""Gradients that come late, on one stream or several: buckets wait for all of them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from slow import CYCLES, written_late
from torch import nn

import mpiddl

WIDTH, LAYERS = 128, 4
TOLERANCE = 1e-12


def layers(world, seed=0):
    torch.manual_seed(seed)
    made = [nn.Linear(WIDTH, WIDTH, bias=layer % 2 == 0) for layer in range(LAYERS)]
    return nn.ModuleList(made).double().to(world.device)


class OneStream(nn.Module):
    def __init__(self, world):
        super().__init__()
        self.layers = layers(world)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


class SeveralStreams(nn.Module):
    """Each layer on a stream of its own; autograd runs its backward there too."""

    def __init__(self, world):
        super().__init__()
        self.layers = layers(world)
        self.streams = [torch.cuda.Stream() for _ in self.layers]

    def forward(self, x):
        here, parts = torch.cuda.current_stream(), []
        for layer, stream in zip(self.layers, self.streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                parts.append(layer(x).tanh())
        for stream in self.streams:
            here.wait_stream(stream)
        return torch.stack(parts).square().mean()


def inputs_of(rank, step, world):
    random = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, WIDTH, generator=random, dtype=torch.float64).to(world.device)


def gradients(make, rank, step, world):
    """Those of one rank, without MPI and without haste."""
    model = make(world)
    model(inputs_of(rank, step, world)).backward()
    torch.cuda.current_stream().synchronize()
    return [parameter.grad for parameter in model.parameters()]


def wrong(model, make, step, world):
    """Names of the parameters whose gradients are not the mean over ranks."""
    everyones = [gradients(make, rank, step, world) for rank in range(world.size)]
    means = [sum(grads) / world.size for grads in zip(*everyones, strict=True)]
    pairs = zip(model.module.named_parameters(), means, strict=True)
    return [
        name
        for (name, parameter), mean in pairs
        if not torch.allclose(parameter.grad, mean, rtol=TOLERANCE, atol=TOLERANCE)
    ]


def slow(gradient):
    """A hook: a copy of the gradient, late on the stream on which it comes."""
    copy = gradient.clone()
    written_late(copy, CYCLES // 4)
    return copy


@pytest.mark.parametrize("make", [OneStream, SeveralStreams])
@pytest.mark.parametrize("engine", ["inline", "thread", "after"])
@pytest.mark.parametrize("bucket_size", [20_000, "200KiB", "25MiB"])
def test_slow_gradients(world, agree, make, engine, bucket_size):
    model = mpiddl.DataParallel(make(world), engine=engine, bucket_size=bucket_size)
    for number, parameter in enumerate(model.parameters()):
        if number % 2 == world.rank % 2:  # others on every rank
            parameter.register_hook(slow)
    for step in range(6):
        model.zero_grad(set_to_none=step % 2 == 0)
        model(inputs_of(world.rank, step, world)).backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]  # at once
        found = wrong(model, make, step, world)
        agree(not found, f"step {step}: {found}")
        seen = zip(grads, model.parameters(), strict=True)
        agree(all(torch.equal(grad, p.grad) for grad, p in seen), f"step {step}: read too early")


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
def test_early_buckets_do_not_wait_for_late_gradients(world, agree, algorithm):
    if world.size == 1:
        pytest.skip("nobody to exchange with")
    model = mpiddl.DataParallel(
        OneStream(world), engine="inline", algorithm=algorithm, bucket_size=WIDTH * WIDTH * 8
    )
    for step in range(2):  # after which buckets stay as they are
        model(inputs_of(world.rank, step, world)).backward()
    model.zero_grad()
    computed, early = torch.cuda.Event(), []

    def watch():
        works, until = model.strategy.scheduler.works, time.monotonic() + 10
        while not works[0].complete and time.monotonic() < until:
            time.sleep(1e-4)
        early.append(works[0].complete and not computed.query())

    watcher = threading.Thread(target=watch)

    def slow_down(gradient):
        torch.cuda._sleep(50 * CYCLES)  # some 300 ms
        computed.record()
        watcher.start()
        return gradient

    model.module.layers[0].weight.register_hook(slow_down)
    model(inputs_of(world.rank, 2, world)).backward()
    watcher.join()
    agree(early == [True], "the first bucket waited for the last gradient")
    found = wrong(model, OneStream, 2, world)
    agree(not found, found)


@pytest.mark.parametrize("overlaps", [False, True])
def test_steps_right_after_slow_gradients(world, agree, overlaps):
    """The optimizer's kernels come after the exchange, the next forward's after the optimizer's."""
    model, alone = mpiddl.DataParallel(OneStream(world), bucket_size=50_000), OneStream(world)
    for parameter in model.parameters():
        parameter.register_hook(slow)
    stepper = (
        mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.5)
        if overlaps
        else torch.optim.SGD(model.parameters(), lr=0.5)
    )
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
    for step in range(10):
        stepper.zero_grad()
        model(inputs_of(world.rank, step, world)).backward()
        stepper.step()
        optimizer.zero_grad()
        for rank in range(world.size):
            (alone(inputs_of(rank, step, world)) / world.size).backward()
        optimizer.step()
    model.synchronize()
    for (name, parameter), want in zip(
        model.module.named_parameters(), alone.parameters(), strict=True
    ):
        agree(torch.allclose(parameter, want, rtol=1e-10, atol=1e-12), name)
    mpiddl.replicas.check(model)


@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_backward_on_a_users_stream(world, agree, engine):
    model = mpiddl.DataParallel(OneStream(world), engine=engine, bucket_size=50_000)
    for parameter in model.parameters():
        parameter.register_hook(slow)
    stream = torch.cuda.Stream()
    for step in range(5):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.zero_grad()
            model(inputs_of(world.rank, step, world)).backward()
            found = wrong(model, OneStream, step, world)
        agree(not found, f"step {step}: {found}")
