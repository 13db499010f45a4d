"""Ranks with different numbers of batches, against one rank that sees all of them."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, nullcontext

import pytest
import torch
from mpi4py import MPI
from samples import seeded
from torch import nn
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.errors import MismatchError
from mpiddl.training.join.announcements import announcements_of
from mpiddl.training.join.optimizer_state import broadcast_plain_state

pytestmark = pytest.mark.layout

COUNTS = (3, 0, 5, 2)
"""Batches of each rank."""
LENGTHS = (2, 3, 4)
"""Rows of a batch."""


def batch_of(rank, step):
    generator = seeded(100 * rank + step)
    rows = LENGTHS[(rank + step) % len(LENGTHS)]
    inputs = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return inputs, inputs.sin().sum(1, keepdim=True)


def make_model(norm=True, seed=1):
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
    # A bias before a normalisation has no gradient but noise, of which Adam makes steps.
    return nn.Sequential(
        nn.Linear(6, 8, bias=not norm), middle, nn.Tanh(), nn.Linear(8, 1)
    ).double()


def make_optimizer(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.8, 0.95))
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def wrap(module, **options):
    return mpiddl.DataParallel(mpiddl.SyncBatchNorm.convert(module), bucket_size=100, **options)


def steps_alone(model, size, weighting, window=1):
    """The oracle. A global batch is what all ranks that still train have at this step.

    Args:
        model: Trained in place.
        size: World size.
        weighting: ``active``: the mean over ranks that take part; ``world``: over all ranks;
            ``samples``: over samples.
        window: Batches per optimizer step.
    """
    optimizer, schedule = make_optimizer(model)
    took_part = set()
    for step in range(max(COUNTS[:size])):
        active = [rank for rank in range(size) if COUNTS[rank] > step]
        took_part |= set(active)
        parts = [batch_of(rank, step) for rank in active]
        outputs = model(torch.cat([inputs for inputs, _ in parts]))
        targets = torch.cat([target for _, target in parts])
        lengths = [len(inputs) for inputs, _ in parts]
        pairs = zip(outputs.split(lengths), targets.split(lengths), strict=True)
        if weighting == "samples":
            mse_loss(outputs, targets).backward()
        else:
            sum(mse_loss(*pair) for pair in pairs).backward()
        if (step + 1) % window:
            continue
        if weighting != "samples":
            for parameter in model.parameters():
                parameter.grad /= len(took_part) if weighting == "active" else size
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        took_part.clear()
    return optimizer


def train(model, world, weighting, window=1):
    """The user's loop."""
    optimizer, schedule = make_optimizer(model)
    held = [optimizer, schedule]
    with mpiddl.join(model, optimizers=held, divide_by_world_size=weighting == "world"):
        for step in range(COUNTS[world.rank]):
            inputs, targets = batch_of(world.rank, step)
            reduces = (step + 1) % window == 0
            with ExitStack() as stack:
                if weighting == "samples":
                    stack.enter_context(model.batch(local=len(inputs)))
                stack.enter_context(nullcontext() if reduces else model.no_sync())
                mse_loss(model(inputs), targets).backward()
            if reduces:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return optimizer, schedule


def near(a, b):
    return torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-11)


def bits(value):
    """A fingerprint of nested state, the same on ranks that hold the same bits."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(bits(item) for item in value)
    return value


@pytest.mark.parametrize("norm", [True, False], ids=["SyncBatchNorm", "plain"])
@pytest.mark.parametrize(
    ("weighting", "window"), [("active", 1), ("world", 1), ("samples", 1), ("active", 2)]
)
def test_as_one_rank_with_all_batches(world, agree, norm, weighting, window):
    model, alone = wrap(make_model(norm)), make_model(norm)

    optimizer, schedule = train(model, world, weighting, window)

    want = steps_alone(alone, world.size, weighting, window)
    for name, tensor in alone.state_dict().items():
        agree(near(model.state_dict()[name], tensor), f"{name}: {model.state_dict()[name]}")
    mpiddl.replicas.check(model, buffers=True)
    state, wanted = optimizer.state_dict(), want.state_dict()
    agree(state["param_groups"] == wanted["param_groups"], state["param_groups"])
    for number, slots in wanted["state"].items():
        for name, slot in slots.items():
            agree(near(state["state"][number][name], slot), name)
    everyones = MPI.COMM_WORLD.allgather([bits(state), schedule.state_dict()])
    agree(all(theirs == everyones[0] for theirs in everyones), "states differ")
    agree(announcements_of(world) is None)


def test_training_goes_on_after_it(world, agree):
    """Nothing of the shadowed backwards is left in buckets or weights."""
    model = wrap(make_model())
    train(model, world, "active")
    model.zero_grad()
    alone = make_model()
    alone.load_state_dict(model.state_dict())
    parts = [batch_of(rank, 9) for rank in range(world.size)]

    mse_loss(model(parts[world.rank][0]), parts[world.rank][1]).backward()

    lengths = [len(inputs) for inputs, _ in parts]
    outputs = alone(torch.cat([inputs for inputs, _ in parts])).split(lengths)
    targets = [target for _, target in parts]
    (sum(map(mse_loss, outputs, targets)) / world.size).backward()
    for parameter, want in zip(model.parameters(), alone.parameters(), strict=True):
        agree(near(parameter.grad, want.grad))


def test_two_models_in_turn(world, agree):
    """As a GAN does: two backwards a step, one of which reaches both models."""
    models = [wrap(make_model(seed=seed)) for seed in (1, 2)]
    alone = [make_model(seed=seed) for seed in (1, 2)]

    def losses(first, second, inputs):
        return first(inputs).square().mean(), (first(inputs) - second(inputs)).square().mean()

    with mpiddl.join(*models):
        for step in range(COUNTS[world.rank]):
            for model in models:
                model.zero_grad()
            for loss in losses(*models, batch_of(world.rank, step)[0]):
                loss.backward()
    for step in range(max(COUNTS[: world.size])):
        for model in alone:
            model.zero_grad()
        active = [rank for rank in range(world.size) if COUNTS[rank] > step]
        parts = [batch_of(rank, step)[0] for rank in active]
        lengths = [len(part) for part in parts]
        first = [model(torch.cat(parts)).split(lengths) for model in (alone[0], *alone)]
        for losses_of_ranks in (
            [part.square().mean() for part in first[0]],
            [(a - b).square().mean() for a, b in zip(first[1], first[2], strict=True)],
        ):
            (sum(losses_of_ranks) / len(active)).backward(retain_graph=True)

    for model, one in zip(models, alone, strict=True):
        for parameter, want in zip(model.parameters(), one.parameters(), strict=True):
            agree(want.grad is None or near(parameter.grad, want.grad), parameter.grad)


def test_groups_join_apart(world, agree):
    group = world.split(world.rank % 2)
    model = wrap(make_model(False), world=group)
    first = torch.nn.utils.parameters_to_vector(model.parameters())
    optimizer, _ = make_optimizer(model)
    with mpiddl.join(model, optimizers=[optimizer]):
        for step in range(COUNTS[world.rank]):
            inputs, targets = batch_of(world.rank, step)
            mse_loss(model(inputs), targets).backward()
            optimizer.step()
    trained = any(COUNTS[rank] for rank in range(world.rank % 2, world.size, 2))
    now = torch.nn.utils.parameters_to_vector(model.parameters())
    agree(torch.equal(first, now) is not trained)
    mpiddl.replicas.check(model, world=group)
    group.close()


def test_an_exception_leaves_the_block_at_once(world, agree):
    model = wrap(make_model())
    with pytest.raises(RuntimeError, match="in the loop"), mpiddl.join(model):
        raise RuntimeError("in the loop")
    agree(announcements_of(world) is None)


def test_ranks_at_different_points_are_told(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    model = wrap(make_model())
    inputs, targets = batch_of(world.rank, 0)
    odd = world.rank == world.size - 1
    with pytest.raises(MismatchError, match=f"rank 0: .*; rank {world.size - 1}: "):  # noqa: PT012, SIM117
        with mpiddl.join(model), model.no_sync() if odd else nullcontext():
            for _ in range(2):
                mse_loss(model(inputs), targets).backward()
    agree(True)


def test_samples_must_add_up(world, agree):
    model = wrap(make_model(False))
    inputs, targets = batch_of(world.rank, 0)
    with (
        pytest.raises(MismatchError, match="told total=99"),
        mpiddl.join(model),
        model.batch(local=len(inputs), total=99),
    ):
        mse_loss(model(inputs), targets).backward()
    with pytest.raises(ValueError, match=r"needs total=.*join\(\)"):
        model.batch(local=1).__enter__()
    agree(True)


def test_what_cannot_be_joined(world, agree):
    model, other = wrap(make_model()), wrap(make_model())
    group = world.split(0)
    for models, message in [
        ((), "needs the models"),
        ((make_model(),), "wrapped in mpiddl.DataParallel, got a Sequential"),
        ((model, wrap(make_model(False), world=group)), "different ranks"),
        ((mpiddl.DataParallel(
            mpiddl.SyncBatchNorm.convert(make_model(), world=group)),), "'module.1' takes"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mpiddl.join(*models).__enter__()
    with mpiddl.join(model), pytest.raises(ValueError, match="inside another one"):
        mpiddl.join(other).__enter__()
    plain = wrap(make_model(False))
    loss = plain(batch_of(0, 0)[0]).sum()
    with pytest.raises(ValueError, match="was not passed"), mpiddl.join(model):
        loss.backward()
    with pytest.raises(TypeError, match=r"Odd\['key'\] is a set"):
        broadcast_plain_state(Odd(), world, world.rank)
    agree(True)
    group.close()


def test_a_schedule_arrives_as_it_was(world, agree):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 4 + world.rank])
    broadcast_plain_state(schedule, world, world.size - 1)
    # Not a dictionary, of whose items there is one each.
    agree(list(schedule.milestones.elements()) == [2, 2, 3 + world.size], schedule.milestones)


class Odd:
    def state_dict(self):
        return {"key": {1}}
