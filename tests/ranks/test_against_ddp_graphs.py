"""Graphs that change, and compilers: the same as under torch's DDP, on gloo."""

from __future__ import annotations

import pytest
import torch
from ddp import FEATURES, batch, both, difference, mlp, sgd, train
from samples import seeded
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import mpiddl
from mpiddl.errors import GradientError

pytestmark = [pytest.mark.usefixtures("gloo"), pytest.mark.thorough]


class Branches(nn.Module):
    """Of four branches each forward takes one; the last is never taken."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(FEATURES, 8).double()
        self.branches = nn.ModuleList(nn.Linear(8, 8).double() for _ in range(4))
        self.last = nn.Linear(8, 1).double()

    def forward(self, inputs, branch):
        return self.last(self.branches[branch](self.first(inputs)).tanh())


def train_branches(model, world, branch_of, steps=4, accumulates=False):
    optimizer = sgd(model)
    for step in range(steps):
        inputs, targets = batch(world, step)
        if not accumulates or step % 2 == 0:
            optimizer.zero_grad()
        mse_loss(model(inputs, branch_of(step)), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("accumulates", [False, True])
def test_parameters_that_some_ranks_do_not_use(world, agree, accumulates):
    """Another branch on each rank; those that no rank took keep a gradient of None."""
    want, got = both(
        Branches,
        lambda model: train_branches(
            model, world, lambda step: (step + world.rank) % 3, accumulates=accumulates
        ),
        theirs={"bucket_cap_mb": 0.0005},
        ours={"bucket_size": 500},
        find_unused_parameters=True,
    )
    agree(not difference(want, got), difference(want, got))
    agree(got["gradient of branches.3.weight"] is None)


def test_unused_parameters_after_no_sync(world, agree):
    """What was used under ``no_sync`` only is reduced by the next backward that is."""

    def loop(model):
        optimizer = sgd(model)
        inputs, targets = batch(world, 0)
        with model.no_sync():
            mse_loss(model(inputs, 0), targets).backward()
        mse_loss(model(inputs, 1), targets).backward()
        optimizer.step()

    want, got = both(Branches, loop, find_unused_parameters=True)
    agree(not difference(want, got), difference(want, got))


def test_without_that_option_an_unused_parameter_is_named(world, agree):
    model = mpiddl.DataParallel(Branches())
    with pytest.raises(GradientError, match=r"'branches\.1\.weight'"):
        train_branches(model, world, lambda step: 0)
    agree(True)


def test_a_static_graph(world, agree):
    """A branch twice in one forward, others never: the first step shows it, the rest rely on it."""

    def loop(model):
        optimizer = sgd(model)
        for step in range(4):
            inputs, targets = batch(world, step)
            optimizer.zero_grad()
            loss = mse_loss(model(inputs, 1), targets)
            loss.backward()
            optimizer.step()

    want, got = both(
        Branches,
        loop,
        theirs={"bucket_cap_mb": 0.0005},
        ours={"bucket_size": 500},
        static_graph=True,
    )
    agree(not difference(want, got), difference(want, got))


def test_frozen_and_unfrozen_during_training(world, agree):
    """torch must be wrapped anew for that."""
    stages = [[], ["0."], ["0.", "2."], []]

    def freeze(module, prefixes):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(prefixes) or ("none",)))
            parameter.grad = None

    want = mlp()
    for prefixes in stages:
        freeze(want, prefixes)
        train(DistributedDataParallel(want), world, 2)
    model = mpiddl.DataParallel(mlp(), bucket_size=500)
    for prefixes in stages:
        freeze(model.module, prefixes)
        train(model, world, 2)

    pairs = zip(want.parameters(), model.module.parameters(), strict=True)
    agree(all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs))


# torch's own, while it compiles; DDP's at every new graph
quiet = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore::FutureWarning"
)


@quiet
@pytest.mark.parametrize("where", ["around the wrapper", "inside it", "both"])
def test_compiled(world, agree, where):
    """With a back end that needs no compiler."""

    def compiled(module):
        return torch.compile(module, backend="aot_eager")

    want = mlp()
    train(DistributedDataParallel(want), world)
    torch._dynamo.reset()
    module = mlp()
    inner = module if where == "around the wrapper" else compiled(module)
    model = mpiddl.DataParallel(inner, bucket_size=500)
    train(model if where == "inside it" else compiled(model), world)

    pairs = zip(want.parameters(), module.parameters(), strict=True)
    agree(all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs))
    mpiddl.replicas.check(model)


@quiet
def test_compiled_with_accumulation_and_batch(world, agree):
    def loop(model, compiled):
        optimizer = sgd(model)
        for step in range(2):
            inputs, targets = batch(world, step)
            optimizer.zero_grad()
            with model.no_sync():
                mse_loss(compiled(inputs), targets).backward()
            mse_loss(compiled(inputs), targets).backward()
            optimizer.step()

    want = DistributedDataParallel(mlp())
    loop(want, want)
    torch._dynamo.reset()
    model = mpiddl.DataParallel(mlp())
    loop(model, torch.compile(model, backend="aot_eager"))

    pairs = zip(want.module.parameters(), model.module.parameters(), strict=True)
    agree(all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs))


def test_sparse_gradients_of_embeddings(world, agree):
    def make():
        torch.manual_seed(6)
        return nn.Sequential(nn.EmbeddingBag(20, FEATURES, sparse=True), nn.Linear(FEATURES, 1))

    def loop(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            tokens = torch.randint(0, 20, (4, 3), generator=seeded(10 * step + world.rank))
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            agree(model.module[0].weight.grad.is_sparse)
            optimizer.step()

    want, got = both(make, loop)
    agree(not difference(want, got, 1e-6), difference(want, got, 1e-6))
