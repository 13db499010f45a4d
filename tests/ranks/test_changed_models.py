"""Models that change after wrapping are refused; wrappers that are copied and saved go on."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from ddp import batch, mlp, train
from torch import nn
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.errors import GradientError


def add_parameter(model):
    model.module.extra = nn.Parameter(torch.zeros(1))


def replace_layer(model):
    model.module[0] = mlp()[0]


def assign_state(model):
    model.load_state_dict(mlp(seed=2).state_dict(), assign=True)


def to_float32(model):
    model.float()


def to_other_memory(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.t().contiguous().t()


@pytest.mark.parametrize("change", [add_parameter, replace_layer, assign_state])
def test_new_parameters_are_refused_by_name(world, agree, change):
    model = mpiddl.DataParallel(mlp())
    change(model)
    with pytest.raises(GradientError, match=r"parameter '(extra|0\.weight)'"):
        model(batch(world, 0)[0])
    agree(True)


def test_another_dtype_is_refused_by_name(world, agree):
    model = mpiddl.DataParallel(mlp())
    to_float32(model)
    with pytest.raises(GradientError, match=r"'0\.weight'.*float64.*float32"):
        mse_loss(model(batch(world, 0, torch.float32)[0]), torch.ones(4, 1)).backward()
    agree(True)


@pytest.mark.parametrize("change", [to_other_memory, lambda model: model.double()])
def test_changes_that_do_not_matter(world, agree, change):
    model, same = mpiddl.DataParallel(mlp()), mpiddl.DataParallel(mlp())
    change(model)

    train(model, world)

    train(same, world)
    agree(all(map(torch.allclose, model.parameters(), same.parameters())))
    mpiddl.replicas.check(model)


def test_a_removed_parameter_is_refused_by_name(world, agree):
    model = mpiddl.DataParallel(mlp())
    model.module[0] = nn.Linear(6, 16).double().requires_grad_(False)
    with pytest.raises(GradientError, match=r"'0\.weight'"):
        model(batch(world, 0)[0])
    agree(True)


def saved(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_a_wrapper_of_its_own(world, agree, copied):
    model, same = mpiddl.DataParallel(mlp(), bucket_size=500), mpiddl.DataParallel(mlp())
    train(model, world)
    train(same, world)

    other = copied(model)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    train(other, world)

    train(same, world)
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    agree(isinstance(other, mpiddl.DataParallel) and torch.equal(before, after))
    agree(all(map(torch.allclose, other.parameters(), same.parameters())))
    mpiddl.replicas.check(other)


def test_a_copy_that_is_not_trained_sends_nothing(world, agree):
    """As with an exponential moving average that rank 0 alone keeps and evaluates."""
    model = mpiddl.DataParallel(mlp()).eval()
    if world.rank == 0:
        free = list(world.tags._free)
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        assert not average.module.training
        assert torch.equal(average(batch(world, 0)[0]), model(batch(world, 0)[0]))
        assert world.tags._free == free
    agree(True)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
def test_a_copy_does_not_share_the_optimizer_of_the_original(world, agree, copied):
    model, same = mpiddl.DataParallel(mlp()), mpiddl.DataParallel(mlp())
    optimizer = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    inputs, targets = batch(world, 0)
    for _ in range(2):  # hooks in submodules come with the second forward
        mse_loss(model(inputs), targets).backward()
        optimizer.step()

    other = copied(model)  # waits for the step

    agree(all(map(torch.equal, other.parameters(), model.parameters())))
    same.load_state_dict(other.state_dict())
    train(other, world)
    train(same, world)
    agree(all(map(torch.allclose, other.parameters(), same.parameters())))


def test_state_dicts_go_round(world, agree):
    model = mpiddl.DataParallel(mlp())
    train(model, world)
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    memory.seek(0)

    alone, other = mlp(seed=2), mpiddl.DataParallel(mlp(seed=3))
    alone.load_state_dict(torch.load(memory, weights_only=True))
    other.load_state_dict(alone.state_dict())

    agree(all(map(torch.equal, model.parameters(), other.parameters())))
    train(model, world)
    train(other, world)
    agree(all(map(torch.equal, model.parameters(), other.parameters())))


def compiled(place):
    """A small model, compiled as a whole or in part."""
    net = mlp()
    if place == "part":
        net[2] = torch.compile(net[2], backend="eager")
    model = torch.compile(net, backend="eager") if place == "inside" else net
    model = mpiddl.DataParallel(model)
    return torch.compile(model, backend="eager") if place == "around" else model


def test_checkpoints_of_compiled_models_fit_plain_ones_and_back(world, agree, shared_tmp_path):
    places = ["nowhere", "part", "inside", "around"]
    states = {}
    for place in places:
        model = compiled(place)
        with torch.no_grad():
            next(model.parameters()).fill_(places.index(place))
        states[place] = model.state_dict()
        mpiddl.checkpoint.save(shared_tmp_path / place, 1, model=model)
    for saved in places:
        for loaded in places:
            model, other = compiled(loaded), compiled(loaded)
            mpiddl.checkpoint.load(shared_tmp_path / saved, model=model)
            want = list(states[saved].values())
            agree(all(map(torch.equal, model.state_dict().values(), want)), f"{saved}, {loaded}")
            if loaded != "around":
                other.load_state_dict(states[saved])
                agree(all(map(torch.equal, other.state_dict().values(), want)))
