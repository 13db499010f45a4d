"""The same training under torch's DistributedDataParallel and under ours."""

from __future__ import annotations

import contextlib

import torch
from samples import seeded
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import mpiddl

FEATURES, ROWS = 6, 4


def mlp(width=16, depth=3, dtype=torch.float64, seed=1):
    """Small, the same on every rank."""
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, width), nn.Tanh()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 1)).to(dtype)


def batch(world, step, dtype=torch.float64):
    """This rank's inputs and targets of a step."""
    generator = seeded(1000 * step + world.rank)
    inputs = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), inputs.sin().sum(1, keepdim=True).to(dtype)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(model, world, steps=3, optimizer_of=sgd, dtype=torch.float64):
    """The plain loop."""
    optimizer = optimizer_of(model)
    for step in range(steps):
        inputs, targets = batch(world, step, dtype)
        optimizer.zero_grad()
        mse_loss(model(inputs), targets).backward()
        optimizer.step()


def tensors_of(model):
    """Parameters, buffers and gradients by name; of gradients that are None, None."""
    named = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        named[f"gradient of {name}"] = None if grad is None else grad.clone()
    return named


def both(make, loop, theirs=None, ours=None, **options):
    """What ``loop(model)`` makes of a model, under torch's DDP and under ours.

    Args:
        make: Builds the model.
        loop: Trains it.
        theirs: Options of torch's alone.
        ours: Options of ours alone.
        options: Of both.
    """
    model = DistributedDataParallel(make(), **(theirs or {}), **options)
    loop(model)
    want = tensors_of(model.module)
    model = mpiddl.DataParallel(make(), **(ours or {}), **options)
    loop(model)
    mpiddl.replicas.check(model, model.world)
    return want, tensors_of(model.module)


def difference(want, got, tolerance=1e-10):
    """The first tensor that is not the same within rounding, in words; "" if all are."""
    if list(want) != list(got):
        return f"{list(want)} and {list(got)}"
    for name, tensor in want.items():
        other = got[name]
        if (tensor is None) is not (other is None):
            return f"{name} is {other}, torch has {tensor}"
        if tensor is not None and not torch.allclose(
            tensor.to_dense().double(), other.to_dense().double(), rtol=tolerance, atol=tolerance
        ):
            return f"{name} is off by {(tensor.to_dense() - other.to_dense()).abs().max()}"
    return ""


@contextlib.contextmanager
def process_group(world):
    """torch.distributed on gloo, among the ranks of ``world``."""
    distributed = torch.distributed
    first = world.rank == 0
    store = (
        distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if first else None
    )
    port = mpiddl.broadcast_json(store.port if store else None, world=world)
    store = store or distributed.TCPStore("127.0.0.1", port, None, False)
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        mpiddl.barrier(world=world)
        distributed.destroy_process_group()
        mpiddl.barrier(world=world)  # the store lives on rank 0
