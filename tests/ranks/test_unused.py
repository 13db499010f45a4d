"""Parameters that take no part, together with ranks that take no part."""

from __future__ import annotations

import pytest
import torch
from samples import seeded
from torch import nn

import mpiddl

pytestmark = pytest.mark.device

FEATURES = 4


class Branches(nn.Module):
    """Of the branches each forward takes one."""

    def __init__(self, count=3):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(FEATURES, 5)
        self.branches = nn.ModuleList(nn.Linear(5, 1) for _ in range(count))
        self.double()

    def forward(self, inputs, branch):
        return self.branches[branch](self.first(inputs).tanh())


def inputs_of(rank, step=0):
    generator = seeded(10 * step + rank)
    return torch.randn(3, FEATURES, generator=generator, dtype=torch.float64)


def alone(parts):
    """The oracle: gradients of the weighted sum of some ranks' losses, without MPI."""
    model = Branches()
    for weight, rank, step, branch in parts:
        (weight * model(inputs_of(rank, step), branch).square().mean()).backward()
    return [parameter.grad for parameter in model.parameters()]


def problem(model, want):
    for (name, parameter), gradient in zip(model.named_parameters(), want, strict=True):
        if (parameter.grad is None) is not (gradient is None):
            return f"{name}: {parameter.grad}, expected {gradient}"
        if gradient is not None and not torch.allclose(parameter.grad, gradient, rtol=1e-12):
            return f"{name} is off by {(parameter.grad - gradient).abs().max()}"
    return ""


@pytest.mark.parametrize("mode", ["find_unused_parameters", "static_graph"])
@pytest.mark.parametrize("empty_runs_backward", [False, True])
def test_a_rank_without_samples(world, agree, mode, empty_runs_backward):
    """In the first step the last rank is empty; what only it uses counts from the second on."""
    if world.size == 1:
        pytest.skip("one rank has all samples")
    model = mpiddl.DataParallel(Branches(), bucket_size=100, **{mode: True})
    last = world.size - 1
    branch_of = [0] * last + [1]
    for step in range(3):
        model.zero_grad()
        empty = last if step == 0 else 0 if step == 2 else None
        ranks = [rank for rank in range(world.size) if rank != empty]
        with model.batch(local=int(world.rank in ranks), total=len(ranks)):
            if world.rank in ranks or empty_runs_backward:
                model(inputs_of(world.rank, step), branch_of[world.rank]).square().mean().backward()
        want = alone([(1 / len(ranks), rank, step, branch_of[rank]) for rank in ranks])
        if empty_runs_backward and empty is not None:  # it did take part, with zeros
            for parameter in (2 * branch_of[empty] + 2, 2 * branch_of[empty] + 3):
                zeros = torch.zeros_like(list(Branches().parameters())[parameter])
                want[parameter] = zeros if want[parameter] is None else want[parameter]
        if mode == "static_graph" and step == 2:
            want = [
                torch.zeros_like(parameter) if gradient is None and number < 6 else gradient
                for number, (gradient, parameter) in enumerate(
                    zip(want, Branches().parameters(), strict=True)
                )
            ]
        agree(not problem(model.module, want), f"step {step}: {problem(model.module, want)}")


def test_what_one_rank_used_under_no_sync(world, agree):
    """Nobody uses those branches in the backward that is reduced."""
    model = mpiddl.DataParallel(Branches(world.size + 2), find_unused_parameters=True)
    with model.no_sync():
        model(inputs_of(world.rank), world.rank).sum().backward()
    model(inputs_of(world.rank), world.size).sum().backward()

    oracle = Branches(world.size + 2)
    for rank in range(world.size):
        for branch in (rank, world.size):
            (oracle(inputs_of(rank), branch).sum() / world.size).backward()
    want = [parameter.grad for parameter in oracle.parameters()]
    agree(not problem(model.module, want), problem(model.module, want))


@pytest.mark.parametrize("mode", ["find_unused_parameters", "static_graph"])
def test_a_gradient_from_elsewhere_stays(world, agree, mode):
    """No rank's backward uses that branch; a gradient was put there before the second."""
    model = mpiddl.DataParallel(Branches(), **{mode: True})
    bias = model.module.branches[2].bias
    for step, before in enumerate([None, torch.full_like(bias, world.rank + 1.0), None]):
        model.zero_grad()
        bias.grad = before
        model(inputs_of(world.rank, step), 0).square().mean().backward()
        want = alone([(1 / world.size, rank, step, 0) for rank in range(world.size)])
        if step == 1:
            want[-1] = torch.full_like(bias, (world.size + 1) / 2)
        agree(not problem(model.module, want), f"step {step}: {problem(model.module, want)}")


@pytest.mark.parametrize("mode", ["find_unused_parameters", "static_graph"])
def test_in_join(world, agree, mode):
    """Rank r has r+1 batches, and a branch of its own."""
    model = mpiddl.DataParallel(Branches(world.size), bucket_size=100, **{mode: True})
    seen = []
    with mpiddl.join(model):
        for step in range(world.rank + 1):
            model.zero_grad()
            model(inputs_of(world.rank, step), world.rank).square().mean().backward()
            oracle = Branches(world.size)
            active = range(step, world.size)
            for rank in active:
                (oracle(inputs_of(rank, step), rank).square().mean() / len(active)).backward()
            want = oracle.first.weight.grad, oracle.branches[world.rank].weight.grad
            got = model.module.first.weight.grad, model.module.branches[world.rank].weight.grad
            seen += [torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, want, strict=True)]
    agree(all(seen), seen)


def test_buffers_in_join_are_those_of_a_rank_that_still_trains(world, agree):
    """Rank r has r+1 batches: in step s, rank s is the first that has one."""

    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(FEATURES, 3), nn.BatchNorm1d(3)).double()

    model = mpiddl.DataParallel(make())
    seen = []
    with mpiddl.join(model):
        for step in range(world.rank + 1):
            model(inputs_of(world.rank, step)).square().mean().backward()
            oracle = make()
            for rank in range(step + 1):
                oracle(inputs_of(rank, rank))
            seen.append(torch.allclose(model.module[1].running_mean, oracle[1].running_mean))
    agree(all(seen), seen)
