"""Steps that are not those of the other ranks: gradients that were not reduced, or left out."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from ddp import batch, mlp
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.errors import GradientError, MismatchError


def arm(parameters, clears):
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.05) for parameter in parameters}

    def hook(parameter):
        optimizers[parameter].step()
        if clears != "keep":
            parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("clears", ["none", "keep"])
def test_an_optimizer_in_a_gradient_hook_is_refused(world, agree, when, clears):
    net = mlp()
    if when == "before":
        arm(net.parameters(), clears)
    model = mpiddl.DataParallel(net)
    if when == "after":
        arm(net.parameters(), clears)
    before = [parameter.clone() for parameter in net.parameters()]
    inputs, targets = batch(world, 0)
    loss = mse_loss(model(inputs), targets)
    with pytest.raises(GradientError, match=r"SGD\.step\(\).*OverlappedOptimizer"):
        loss.backward()
    agree(all(map(torch.equal, before, net.parameters())), "stepped all the same")


def test_on_purpose_a_rank_may_step_alone(world, agree):
    net = mlp()
    model = mpiddl.DataParallel(net)
    arm(net.parameters(), "none")
    inputs, targets = batch(world, 0)
    before = net[0].weight.clone()
    with model.no_sync():
        mse_loss(model(inputs), targets).backward()
    agree(not torch.equal(before, net[0].weight))


def test_a_gradient_that_a_hook_takes_away_is_named(world, agree):
    net = mlp()

    def take_away(parameter):
        parameter.grad = None

    net[4].bias.register_post_accumulate_grad_hook(take_away)
    model = mpiddl.DataParallel(net)
    loss = model(batch(world, 0)[0]).sum()
    with pytest.raises(GradientError, match=r"'4\.bias' was set to None during backward"):
        loss.backward()
    agree(True)


def test_gradients_that_were_set_by_hand_are_warned_of_once(world, agree, caplog):
    model = mpiddl.DataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = batch(world, 0)
    with caplog.at_level(logging.WARNING, "mpiddl"):
        for _ in range(2):  # as usual; clipped into other tensors; a forward on the way
            optimizer.zero_grad()
            mse_loss(model(inputs), targets).backward()
            for parameter in model.parameters():
                parameter.grad = parameter.grad.clamp(-1, 1)
            optimizer.step()
            optimizer.zero_grad()
            mse_loss(model(inputs), targets).backward()
            model(inputs)
            optimizer.step()
        agree(not caplog.text, caplog.text)
        for _ in range(2):
            parameters = list(model.parameters())
            loss = mse_loss(model(inputs), targets)
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
    agree(caplog.text.count("torch.autograd.grad") == 1, caplog.text)


@pytest.fixture
def checked(world):
    """With MPIDDL_CHECK=1."""
    before = world.settings
    world.settings = dataclasses.replace(before, check=True)
    yield world
    world.settings = before


def test_a_backward_that_one_rank_leaves_out_is_found_at_the_next(checked, agree):
    world = checked
    model = mpiddl.DataParallel(mlp())
    last = 0 < world.rank == world.size - 1
    inputs, _ = batch(world, 0)
    with model.no_sync():
        for _ in range(1 + last):  # accumulated: as many as a rank likes
            model(inputs).sum().backward()
    for _ in range(2):
        model(inputs).sum().backward()
    with model.batch(local=0 if last else 4, total=4 * max(1, world.size - 1)):
        output = model(inputs)  # whose loss is bad on the last rank
        if not last:
            output.sum().backward()
    if world.size == 1:
        return
    if last:
        model(inputs)
    output = model(inputs)
    with pytest.raises(MismatchError, match=r"1 on rank 0.*2 on rank .*batch\(local=0"):
        output.sum().backward()
    agree(True)
