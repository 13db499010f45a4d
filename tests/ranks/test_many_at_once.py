"""Many collectives in flight: of several groups, waited for in any order, beside a backward."""

from __future__ import annotations

import random

import pytest
import torch
from cases import NAMES, Case
from torch import nn

import mpiddl
from mpiddl.comm.messages import Tags
from mpiddl.engine.engine import engine_of

pytestmark = [pytest.mark.library, pytest.mark.device]


def test_two_hundred_works_in_any_order(world, agree):
    """Many more than there are lanes and chunks in flight; another order on every rank."""
    lengths = [random.Random(number).choice([0, 1, 40, 3000]) for number in range(200)]
    cases = [
        Case(NAMES[number % len(NAMES)], world, number, torch.int32, length=length)
        for number, length in enumerate(lengths)
    ]
    works = [case.start(async_=True) for case in cases]
    for work in random.Random(world.rank).sample(works, 200):
        work.wait()

    problems = [case.problem() for case in cases if case.problem()]
    agree(not problems, problems)


def test_two_groups_and_the_world_at_once(world, agree):
    """Groups without a common rank, each with works of its own between those of the world."""
    half, pair = world.split(world.rank % 2), world.split(world.rank // 2)
    groups = [world, half, pair]
    drawn, own = random.Random(3), random.Random(f"own {world.rank}")
    cases, works = [], []
    for number in range(120):
        group = groups[number % 3]
        name = drawn.choice(NAMES)
        case = Case(name, group, number, torch.float32, length=drawn.choice([1, 50, 2000]))
        cases.append(case)
        works.append(case.start(async_=True))
        if own.random() < 0.3:  # a rank waits now and then, when it likes
            own.choice(works).wait()
        if number % 20 == 19:  # and a blocking call of everyone
            total = mpiddl.all_reduce(torch.ones(4))
            agree(total.tolist() == [world.size] * 4, total)
    for work in own.sample(works, len(works)):
        work.wait()

    problems = [case.problem() for case in cases if case.problem()]
    agree(not problems, problems)
    half.close()
    pair.close()


def test_groups_of_groups(world, agree):
    """A group is split again; all of them work side by side."""
    outer = world.split(0, key=-world.rank)
    inner = outer.split(outer.rank % 2)
    cases = [Case("all_reduce", group, 1, torch.int64) for group in (world, outer, inner)]
    works = [case.start(async_=True) for case in cases]
    for work in reversed(works):
        work.wait()
    problems = [case.problem() for case in cases if case.problem()]
    agree(not problems, problems)
    inner.close()
    outer.close()


def test_collectives_while_backward_reduces_buckets(world, agree):
    """A user's own collectives start in the middle of backward, and are waited for after it."""
    torch.manual_seed(0)
    layers = [nn.Linear(20, 20) for _ in range(6)]
    alone = nn.Sequential(*layers).double()
    inputs = torch.arange(20.0 * 8).view(8, 20).double().sin()
    want = torch.autograd.grad(alone(inputs).square().mean(), list(alone.parameters()))
    for algorithm in ("ring", "auto", "direct"):
        model = mpiddl.DataParallel(alone, bucket_size=500, algorithm=algorithm)
        model.zero_grad()
        cases, works, seen = [], [], []

        def more(_, cases=cases, works=works, seen=seen):
            seen.append(len(engine_of(world)._in_flight))
            for name in ("all_reduce", "all_gather", "reduce_scatter"):
                cases.append(Case(name, world, len(cases), torch.float32, length=2000))
                works.append(cases[-1].start(async_=True))

        hooks = [layer.weight.register_post_accumulate_grad_hook(more) for layer in layers]
        model(inputs).square().mean().backward()  # every rank has the same samples
        for hook in hooks:
            hook.remove()
        for work in random.Random(world.rank).sample(works, len(works)):
            work.wait()

        problems = [case.problem() for case in cases if case.problem()]
        agree(len(seen) == len(layers) and len(works) == 3 * len(layers), seen)
        agree(not problems, problems)
        for parameter, gradient in zip(alone.parameters(), want, strict=True):
            error = (parameter.grad - gradient).abs().max().item()
            agree(error < 1e-12, f"gradient off by {error} with {algorithm}")
        model.unwrap()


def test_tags_are_used_again_while_works_are_in_flight(world, agree, monkeypatch):
    """With only 4 tags the fifth work gets the first one's; messages must not be mixed up."""
    monkeypatch.setattr(Tags, "FOREGROUND", 4)
    group = world.split(0)
    cases = [
        Case("all_reduce", group, number, torch.float32, length=1000 + number)
        for number in range(30)
    ]
    own = random.Random(f"reuse {world.rank}")
    works = []
    for case in cases:
        works.append(case.start(algorithm="ring", async_=True))
        unfinished = [work for work in works if not work.complete]
        if world.rank == 0 and unfinished and own.random() < 0.5:
            own.choice(unfinished).done()  # this rank is often ahead of the others
    for work in own.sample(works, len(works)):
        work.wait()
    problems = [case.problem() for case in cases if case.problem()]
    agree(not problems, problems)
    group.close()


def test_an_old_work_keeps_its_tag(world, agree, monkeypatch):
    """A work that only the last rank's own late start completes, and more works than tags."""
    if world.size == 1:
        return
    monkeypatch.setattr(Tags, "FOREGROUND", 2)
    group = world.split(0)
    old, new = torch.ones(5000), torch.ones(5000)
    first = mpiddl.broadcast(old, root=group.size - 1, async_=True, world=group)
    mpiddl.barrier(world=group)
    second = mpiddl.broadcast(new, root=0, async_=True, world=group)  # the tag of ``first``
    agree(first.complete, "two works of one tag are in flight")
    second.wait()
    agree(old[0] == new[0] == 1)
    group.close()
