"""Users' own way to reduce a bucket."""

from __future__ import annotations

import signal

import pytest
import torch
from samples import seeded
from torch import nn

import mpiddl
from mpiddl.base.waits import ALREADY
from mpiddl.compress import BF16
from mpiddl.engine.engine import Engine
from mpiddl.errors import GradientError, NestedCallError

pytestmark = pytest.mark.device


def make():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def loss(model, rank):
    x = torch.randn(4, 6, generator=seeded(rank))
    return model(x).square().mean()


def local_gradients(rank):
    model = make()
    loss(model, rank).backward()
    return [parameter.grad for parameter in model.parameters()]


def mean_gradients(size):
    return [sum(grads) / size for grads in zip(*map(local_gradients, range(size)), strict=True)]


@pytest.mark.parametrize("engine", ["inline", "thread", "after"])
@pytest.mark.parametrize("bucket_size", [700, "1MiB"])
def test_a_hook_replaces_the_all_reduce(world, agree, engine, bucket_size):
    model = mpiddl.DataParallel(make(), bucket_size=bucket_size, engine=engine)
    seen = []

    def hook(state, bucket):
        seen.append((bucket.number, bucket.names))
        assert bucket.weight == 1 / world.size
        copy = bucket.buffer.clone()
        yield from bucket.all_reduce(copy, weight=bucket.weight)
        bucket.buffer.copy_(copy * state)

    model.register_comm_hook(2.0, hook)
    for _ in range(2):
        model.zero_grad()
        loss(model, world.rank).backward()

    count = len(model.plan.buckets)
    agree(sorted(number for number, _ in seen) == sorted([*range(count), *range(count)]), seen)
    names = {name for _, names in seen for name in names}
    agree(names == {name for name, _ in model.module.named_parameters()}, names)
    got = [parameter.grad for parameter in model.parameters()]
    want = [2 * gradient for gradient in mean_gradients(world.size)]
    agree(all(map(torch.allclose, got, want)))


def test_a_hook_sees_the_names_of_its_bucket_after_freezing(world, agree):
    model = mpiddl.DataParallel(make(), bucket_size=700)
    seen = {}

    def hook(state, bucket):
        seen.update(dict.fromkeys(bucket.names))
        yield from bucket.all_reduce(bucket.buffer, weight=bucket.weight)

    model.register_comm_hook(None, hook)
    for frozen in ("0.", "2.", ""):
        for name, parameter in model.module.named_parameters():
            parameter.requires_grad_(not frozen or not name.startswith(frozen))
        seen.clear()
        loss(model, world.rank).backward()
        want = {name for name, p in model.module.named_parameters() if p.requires_grad}
        agree(set(seen) == want, f"{frozen!r} is frozen: {sorted(seen)}")


def test_bf16_on_the_wire_is_rounded_twice_at_most(world, agree):
    model = mpiddl.DataParallel(make(), bucket_size=700)
    model.strategy.use_codec(BF16())
    loss(model, world.rank).backward()

    bits = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    agree(torch.equal(bits, bits.bfloat16().float()), "not rounded to bfloat16")
    everyones = [local_gradients(rank) for rank in range(world.size)]
    for number, want in enumerate(mean_gradients(world.size)):
        got = list(model.parameters())[number].grad
        size = sum(grads[number].abs() for grads in everyones) / world.size
        agree(bool(((got - want).abs() <= size * 2**-7 + 1e-12).all()), number)


def test_hooks_that_are_no_generators_are_refused(world, agree):
    model = mpiddl.DataParallel(make())
    with pytest.raises(TypeError, match="generator function"):
        model.register_comm_hook(None, "bf16")
    model.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    with pytest.raises(TypeError, match=r"returned a Future.*yield from"):
        loss(model, world.rank).backward()
    agree(True)


def test_an_error_in_a_hook_reaches_the_user(world, agree):
    model = mpiddl.DataParallel(make())

    def hook(state, bucket):
        raise ArithmeticError("mine")
        yield

    model.register_comm_hook(None, hook)
    with pytest.raises(ArithmeticError, match="mine"):
        loss(model, world.rank).backward()
    agree(True)


NESTED = {
    "all_reduce": lambda world, bucket: mpiddl.all_reduce(bucket.buffer),
    "wait": lambda world, bucket: mpiddl.all_reduce(bucket.buffer, async_=True).wait(),
    "barrier": lambda world, bucket: mpiddl.barrier(),
    "split": lambda world, bucket: world.split(0),
    "empty": lambda world, bucket: mpiddl.empty(3),
    "close": lambda world, bucket: world.close(),
}


@pytest.mark.parametrize(
    ("engine", "call"), [("thread", "all_reduce"), *(("inline", call) for call in NESTED)]
)
def test_a_blocking_call_in_a_hook_is_refused(world, agree, engine, call):
    if world.size == 1 and call == "empty":
        pytest.skip("waits for nobody")
    group = world.split(0)
    model = mpiddl.DataParallel(make(), world=group, engine=engine)

    def hook(state, bucket):
        yield from bucket.all_reduce(bucket.buffer)
        NESTED[call](group, bucket)

    model.register_comm_hook(None, hook)
    with pytest.raises(NestedCallError, match=r"yield from bucket\.all_reduce"):
        loss(model, world.rank).backward()
    agree(True)
    # Whoever is no part of a collective may wait.
    agree(mpiddl.gather_json(world.rank) == list(range(world.size)))


def test_a_blocking_call_in_a_signal_handler_is_refused(world, agree):
    engine = Engine()  # without a thread, so that the handler comes while this one drives

    def interrupted():
        signal.raise_signal(signal.SIGUSR2)
        yield ALREADY

    before = signal.signal(signal.SIGUSR2, lambda *_: engine.run(interrupted(), world))
    try:
        for start in (engine.run, lambda *work: engine.submit(*work).wait()):
            with pytest.raises(NestedCallError, match="signal handler"):
                start(interrupted(), world)
    finally:
        signal.signal(signal.SIGUSR2, before)
    agree(mpiddl.gather_json(world.rank) == list(range(world.size)))


def never(bucket):
    bucket.all_reduce(bucket.buffer)
    yield from ()


def half(bucket):
    yield next(bucket.all_reduce(bucket.buffer.repeat(1000)), ALREADY)


def two_at_once(bucket):
    first, second = bucket.all_reduce(bucket.buffer), bucket.all_reduce(bucket.buffer.clone())
    yield next(first)
    yield from second


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
@pytest.mark.parametrize(
    ("hook", "words"),
    [(never, "yield from"), (half, "to its end"), (two_at_once, "one after the other")],
)
def test_an_all_reduce_that_a_hook_does_not_finish_is_an_error(
    world, agree, algorithm, hook, words
):
    if world.size == 1 and hook is not never:
        pytest.skip("over at once")
    group = world.split(0)
    model = mpiddl.DataParallel(make(), world=group, algorithm=algorithm)
    model.register_comm_hook(None, lambda state, bucket: hook(bucket))
    with pytest.raises(GradientError, match=words):
        loss(model, world.rank).backward()
    agree(True)


def test_all_reduces_may_be_iterated_in_another_order_than_made(world, agree):
    model = mpiddl.DataParallel(make())
    sums = []

    def hook(state, bucket):
        one, two = torch.ones(3), torch.full((3,), 2.0)
        first, second = bucket.all_reduce(one), bucket.all_reduce(two)
        yield from second
        yield from first
        sums.extend([one, two])

    model.register_comm_hook(None, hook)
    for _ in range(2):  # no place in a queue is left taken
        loss(model, world.rank).backward()
    agree([float(tensor[0]) for tensor in sums] == 2 * [world.size, 2.0 * world.size], sums)
