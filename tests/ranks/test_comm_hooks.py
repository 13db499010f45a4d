"""Users' own way to reduce a bucket."""

from __future__ import annotations

import pytest
import torch
from samples import seeded
from torch import nn

import mpiddl
from mpiddl.training.comm_hooks import bf16_compress


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
    model.register_comm_hook(None, bf16_compress)
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
