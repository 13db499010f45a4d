"""The training loop as users write it: the same parameters as under torch's DDP, on gloo."""

from __future__ import annotations

import pytest
import torch
from ddp import FEATURES, batch, both, difference, mlp, sgd, train
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mpiddl

pytestmark = [pytest.mark.usefixtures("gloo"), pytest.mark.thorough]

BUCKETS = {"theirs": {"bucket_cap_mb": 0.001}, "ours": {"bucket_size": 1000}}


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize("buckets", [{}, BUCKETS], ids=["one bucket", "buckets"])
@pytest.mark.parametrize("optimizer_of", [sgd, adam])
def test_plain(world, agree, buckets, optimizer_of):
    want, got = both(lambda: mlp(32), lambda model: train(model, world, 4, optimizer_of), **buckets)
    agree(not difference(want, got), difference(want, got))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_no_sync_and_accumulation(world, agree, set_to_none):
    def loop(model):
        optimizer = sgd(model)
        for step in range(6):
            inputs, targets = batch(world, step)
            if step % 3 < 2:
                with model.no_sync():
                    mse_loss(model(inputs), targets).backward()
                continue
            mse_loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    want, got = both(mlp, loop, **BUCKETS)
    agree(not difference(want, got), difference(want, got))


def test_several_forwards_and_backwards_per_step(world, agree):
    def loop(model):
        optimizer = sgd(model)
        for step in range(0, 6, 3):
            parts = [batch(world, step + part) for part in range(3)]
            optimizer.zero_grad()
            losses = [mse_loss(model(inputs), targets) for inputs, targets in parts[:2]]
            sum(losses).backward()
            mse_loss(model(parts[2][0]), parts[2][1]).backward()
            optimizer.step()

    want, got = both(mlp, loop, **BUCKETS)
    agree(not difference(want, got), difference(want, got))


def test_tied_parameters(world, agree):
    def make():
        model = mlp(16, 4)
        model[4].weight = model[2].weight
        return model

    want, got = both(make, lambda model: train(model, world))
    agree(not difference(want, got), difference(want, got))


def test_frozen_parameters(world, agree):
    def make():
        model = mlp()
        model[0].requires_grad_(False)
        return model

    want, got = both(make, lambda model: train(model, world))
    agree(not difference(want, got), difference(want, got))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(16, 4)

    def forward(self, inputs):
        hidden = checkpoint(self.layers[:4], inputs, use_reentrant=False)
        return checkpoint(self.layers[4:], hidden, use_reentrant=False)


def test_activation_checkpointing(world, agree):
    want, got = both(Checkpointed, lambda model: train(model, world), **BUCKETS)
    agree(not difference(want, got), difference(want, got))


def test_autocast(world, agree):
    def loop(model):
        optimizer = sgd(model)
        for step in range(3):
            inputs, targets = batch(world, step, torch.float32)
            optimizer.zero_grad()
            with torch.autocast(world.device.type, torch.bfloat16):
                outputs = model(inputs)
                assert outputs.dtype is torch.bfloat16
            mse_loss(outputs.float(), targets).backward()
            optimizer.step()

    want, got = both(lambda: mlp(dtype=torch.float32), loop)
    # A last bit of float32 may turn one of bfloat16, eps 1/128, and so a gradient.
    agree(not difference(want, got, 1e-3), difference(want, got, 1e-3))


@pytest.mark.parametrize("accumulates", [False, True])
def test_grad_scaler_skips_a_step_on_all_ranks(world, agree, accumulates):
    """One rank's gradient overflows in the second of four steps."""
    scales = []

    def loop(model):
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler(world.device.type, init_scale=16.0, growth_interval=2)
        for step in range(4):
            inputs, targets = batch(world, step)
            if step == 1 and world.rank == world.size - 1:
                targets = targets * float("inf")
            optimizer.zero_grad()
            if accumulates:
                with model.no_sync():
                    scaler.scale(mse_loss(model(inputs), targets)).backward()
            scaler.scale(mse_loss(model(inputs), targets)).backward()
            before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            skipped = torch.equal(before, torch.nn.utils.parameters_to_vector(model.parameters()))
            agree(skipped == (step == 1), f"step {step}")
        scales.append(scaler.get_scale())

    want, got = both(mlp, loop)
    agree(not difference(want, got), difference(want, got))
    agree(scales == [16.0, 16.0], scales)


@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_by_norm(world, agree, foreach):
    norms = []

    def loop(model):
        optimizer = sgd(model)
        for step in range(3):
            inputs, targets = batch(world, step)
            optimizer.zero_grad()
            mse_loss(model(inputs), targets).backward()
            norms.append(
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach).item()
            )
            optimizer.step()

    want, got = both(mlp, loop, **BUCKETS)
    agree(not difference(want, got), difference(want, got))
    agree(min(norms) > 0.1 and norms[:3] == pytest.approx(norms[3:], rel=1e-10), norms)


def with_batch_norm():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(FEATURES, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
    ).double()


@pytest.mark.filterwarnings("ignore:.*forward_sync_buffers:FutureWarning")  # its newer name
def test_each_rank_has_its_own_statistics(world, agree):
    want, got = both(
        with_batch_norm,
        lambda model: train(model, world),
        theirs={"broadcast_buffers": False},
        ours={"broadcast_buffers": False},
    )
    agree(not difference(want, got), difference(want, got))


def test_buffers_are_rank_0s_after_every_backward(world, agree):
    """torch makes them so when the next forward begins; after the last one they differ."""
    model = DistributedDataParallel(with_batch_norm())
    train(model, world)
    want = [mpiddl.broadcast(buffer.clone()) for buffer in model.module.buffers()]

    model = mpiddl.DataParallel(with_batch_norm())
    train(model, world)

    agree(all(map(torch.allclose, model.module.buffers(), want)), list(model.module.buffers()))
    mpiddl.replicas.check(model, buffers=True)


def test_two_models_on_two_groups_at_once(world, agree):
    """As in a GAN: one backward reaches both, and no group is another's."""
    rows, columns = world.rank // 2, world.rank % 2
    ranks = range(world.size)

    def loss_of(generator, discriminator):
        return discriminator(torch.tanh(generator(batch(world, 0)[0]).expand(-1, FEATURES))).mean()

    def groups_of(color):
        made = {
            c: torch.distributed.new_group([r for r in ranks if color(r) == c])
            for c in sorted({color(rank) for rank in ranks})
        }
        return made[color(world.rank)]

    def train_both(models):
        optimizers = [sgd(model) for model in models]
        for _ in range(3):
            for model in models:
                model.zero_grad()
            loss_of(*models).backward()
            for optimizer in optimizers:
                optimizer.step()

    theirs = [
        DistributedDataParallel(mlp(seed=1), process_group=groups_of(lambda rank: rank // 2)),
        DistributedDataParallel(mlp(seed=2), process_group=groups_of(lambda rank: rank % 2)),
    ]
    train_both(theirs)
    groups = world.split(rows), world.split(columns)
    ours = [
        mpiddl.DataParallel(mlp(seed=seed), world=group, bucket_size=1000)
        for seed, group in zip((1, 2), groups, strict=True)
    ]
    train_both(ours)
    for one, other in zip(theirs, ours, strict=True):
        pairs = zip(one.module.parameters(), other.module.parameters(), strict=True)
        agree(all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs))
    for group in groups:
        group.close()
