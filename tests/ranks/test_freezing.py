"""Parameters that are frozen and unfrozen while a model is wrapped, wherever that happens."""

from __future__ import annotations

import copy

import pytest
import torch
from ddp import ROWS, batch, mlp
from torch import nn
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.errors import GradientError, ReplicaError

FIRST, LAST = "0.", "4."
TRAINED = [[FIRST], [FIRST, LAST], [LAST], [], [LAST], [FIRST, "2.", LAST]]
"""Layers that are trained, step by step: also only such as no gradient came to before."""


def train_alone(world):
    """The oracle: one process, all ranks' samples."""
    model = mlp()
    loop(model, model, [batch_of_all(world, step) for step in range(len(TRAINED))])
    return model


def batch_of_all(world, step):
    class Rank:
        pass

    parts = []
    for Rank.rank in range(world.size):
        parts.append(batch(Rank, step))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def loop(model, call, batches, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for (inputs, targets), layers in zip(batches, TRAINED, strict=True):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removeprefix("module.").startswith((*layers, "none")))
        optimizer.zero_grad()
        loss = mse_loss(call(inputs), targets)
        if layers:
            loss.backward()
            optimizer.step()


def same(model, want):
    pairs = zip(model.parameters(), want.parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=1e-11, atol=1e-13) for p, q in pairs)


@pytest.mark.parametrize("how", ["train", "eval", "inside", "overlapped"])
def test_unfrozen_parameters_are_reduced_whatever_was_called(world, agree, how):
    model = mpiddl.DataParallel(mlp(), bucket_size=500, check_replicas_every=1)
    model.train(how != "eval")
    optimizer = None
    if how == "overlapped":
        optimizer = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    batches = [batch(world, step) for step in range(len(TRAINED))]

    loop(model, model.module if how == "inside" else model, batches, optimizer)

    model.synchronize()
    agree(same(model, train_alone(world)))
    mpiddl.replicas.check(model)


def test_the_first_gradient_of_a_backward_may_be_that_of_an_unfrozen_parameter(world, agree):
    """Whose hook came with the wrapping, when it was frozen."""
    net = mlp()
    net[4].requires_grad_(False)
    model = mpiddl.DataParallel(net)
    net[4].requires_grad_(True)
    inputs, targets = batch(world, 0)
    mse_loss(net(inputs), targets).backward()
    want = mlp()
    inputs, targets = batch_of_all(world, 0)
    mse_loss(want(inputs), targets).backward()
    pairs = zip(net.parameters(), want.parameters(), strict=True)
    agree(all(torch.allclose(p.grad, q.grad, rtol=1e-11) for p, q in pairs))
    agree(len(model.plan.parameters) == 6)


def test_a_rank_without_samples_follows(world, agree):
    model = mpiddl.DataParallel(mlp())
    model.module[0].requires_grad_(False)
    inputs, targets = batch(world, 0)
    last = world.rank == world.size - 1 and world.size > 1
    with model.batch(local=0 if last else ROWS, total=ROWS * max(1, world.size - 1)):
        if not last:
            mse_loss(model(inputs), targets).backward()
    everyones = mpiddl.gather_json(model.module[2].weight.grad.sum().item(), world=world)
    agree(len(set(everyones)) == 1 and len(model.plan.parameters) == 4, everyones)


def test_all_parameters_may_be_frozen_but_not_at_first(world, agree):
    with pytest.raises(ValueError, match="nothing to reduce"):
        mpiddl.DataParallel(mlp().requires_grad_(False))
    model = mpiddl.DataParallel(mlp())
    plan = model.plan
    inputs, _ = batch(world, 0)
    model.requires_grad_(False)
    assert not model(inputs).requires_grad
    with model.batch(local=0, total=1):
        pass
    model.requires_grad_(True)
    model(inputs).sum().backward()
    agree(model.plan is plan, "frozen for a while, and planned anew")


def test_periodic_checks_see_frozen_parameters(world, agree):
    net = mlp()
    net[0].requires_grad_(False)
    model = mpiddl.DataParallel(net, check_replicas_every=1)
    with torch.no_grad():
        net[0].bias += world.rank
    inputs, _ = batch(world, 0)
    if world.size > 1:
        with pytest.raises(ReplicaError, match=r"'0\.bias'"):
            model(inputs).sum().backward()
    agree(True)


def test_a_parameter_that_is_unfrozen_during_backward_is_refused(world, agree):
    net = mlp()
    net[0].requires_grad_(False)
    model = mpiddl.DataParallel(net)
    net[0].requires_grad_(True)
    output = model.module(batch(world, 0)[0])
    net[0].requires_grad_(False)

    def unfreeze(_bias):
        net[0].requires_grad_(True)

    net[4].bias.register_post_accumulate_grad_hook(unfreeze)
    with pytest.raises(GradientError, match=r"'0\.(weight|bias)' was unfrozen in the middle"):
        output.sum().backward()
    agree(True)


def test_copies_that_are_frozen_or_evaluated_send_nothing(world, agree):
    model = mpiddl.DataParallel(mlp())
    inputs, _ = batch(world, 0)
    if world.rank == 0:
        free = list(world.tags._free)
        teacher = copy.deepcopy(model).requires_grad_(False)
        assert teacher.training
        assert torch.equal(teacher(inputs), model.module(inputs))
        other = copy.deepcopy(model).eval()
        output = other(inputs)
        with pytest.raises(GradientError, match=r"copy got a gradient.*copy\.train\(\)"):
            output.sum().backward()
        assert world.tags._free == free
    agree(True)


def test_two_wrappers_may_share_what_is_frozen(world, agree):
    body = nn.Linear(6, 16).double().requires_grad_(False)
    one, two = (nn.Sequential(body, nn.Linear(16, 1).double()) for _ in range(2))
    models = [mpiddl.DataParallel(one), mpiddl.DataParallel(two)]
    for model in models:
        model(batch(world, 0)[0]).sum().backward()
    models[0].unwrap()
    models[1].unwrap()
    body.requires_grad_(True)
    body(batch(world, 0)[0]).sum().backward()  # nobody watches any more
    agree(True)


def test_join_begins_with_one_plan_and_keeps_it(world, agree):
    model = mpiddl.DataParallel(mlp())
    model.module[0].requires_grad_(False)
    with mpiddl.join(model):
        for step in range(1 + world.rank):
            model(batch(world, step)[0]).sum().backward()
    agree(len(model.plan.parameters) == 4)
    with mpiddl.join(model):
        model.module[0].requires_grad_(True)
        with pytest.raises(GradientError, match=r"inside mpiddl.join\(\)"):
            model(batch(world, 0)[0])
        model.module[0].requires_grad_(False)
    agree(True)
