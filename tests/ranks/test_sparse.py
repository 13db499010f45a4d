"""Sparse gradients of embeddings are added up over ranks, the same bits on each."""

from __future__ import annotations

import copy

import pytest
import torch
from samples import seeded
from torch import nn

import mpiddl
from mpiddl.errors import GradientError, MismatchError

pytestmark = pytest.mark.device

WORDS, WIDTH = 20, 3


def make_model(dtype=torch.float64):
    torch.manual_seed(7)
    return nn.Sequential(
        nn.EmbeddingBag(WORDS, WIDTH, sparse=True, mode="sum"), nn.Tanh(), nn.Linear(WIDTH, 1)
    ).to(dtype)


def tokens_of(rank, step=0, count=4):
    return torch.randint(0, WORDS, (count, 3), generator=seeded(rank + 100 * step))


def loss_of(model, tokens):
    return model(tokens).square().mean()


def alone(losses, model=None):
    """The oracle: gradients of a weighted sum of losses, without MPI."""
    model = model or make_model()
    sum(weight * loss_of(model, tokens) for weight, tokens in losses).backward()
    return [parameter.grad.to_dense() for parameter in model.parameters()]


def check(agree, world, model, want):
    got = [parameter.grad for parameter in model.parameters()]
    agree(got[0].is_sparse)
    agree(got[0].is_coalesced() or world.size == 1)  # one rank's is as autograd left it
    agree(all(torch.allclose(a.to_dense(), b, rtol=1e-12) for a, b in zip(got, want, strict=True)))
    entries = got[0].coalesce()
    sums = [entries.indices().tolist(), entries.values().tolist()]
    everyones = mpiddl.gather_json(sums, world=world)
    agree(all(theirs == everyones[0] for theirs in everyones), "bits differ")


def test_mean_over_ranks(world, agree):
    model = mpiddl.DataParallel(make_model())
    for step in range(2):  # the second adds to the first
        loss_of(model, tokens_of(world.rank, step)).backward()

    want = alone(
        [(1 / world.size, tokens_of(rank, step)) for rank in range(world.size) for step in (0, 1)]
    )
    check(agree, world, model, want)
    agree([spec.name for spec in model.plan.parameters] == ["2.weight", "2.bias"])


def test_accumulation(world, agree):
    model = mpiddl.DataParallel(make_model())
    with model.no_sync():
        loss_of(model, tokens_of(world.rank, 0)).backward()
    loss_of(model, tokens_of(world.rank, 1)).backward()

    want = alone(
        [(1 / world.size, tokens_of(rank, step)) for rank in range(world.size) for step in (0, 1)]
    )
    check(agree, world, model, want)


@pytest.mark.parametrize("runs_backward", [True, False])
def test_exact_weights(world, agree, runs_backward):
    """Ranks hold 0, 1, 2, ... samples; the first one's dummy batch gives NaN."""
    if world.size == 1:
        pytest.skip("one rank has all samples")
    model = mpiddl.DataParallel(make_model())
    total = sum(range(world.size))
    with model.batch(local=world.rank, total=total):
        if world.rank:
            loss_of(model, tokens_of(world.rank, count=world.rank)).backward()
        elif runs_backward:
            (loss_of(model, tokens_of(0)) * float("nan")).backward()

    want = alone([(rank / total, tokens_of(rank, count=rank)) for rank in range(1, world.size)])
    check(agree, world, model, want)


def test_in_join(world, agree):
    """Rank r has r+1 batches; the last backward is the last rank's alone."""
    model = mpiddl.DataParallel(make_model())
    with mpiddl.join(model):
        for step in range(world.rank + 1):
            model.zero_grad()
            loss_of(model, tokens_of(world.rank, step)).backward()
            active = range(step, world.size)
            want = alone([(1 / len(active), tokens_of(rank, step)) for rank in active])
            got = [parameter.grad.to_dense() for parameter in model.parameters()]
            assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))
    agree(True)


class Two(nn.Module):
    """Of two embeddings some are looked at."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.tables = nn.ModuleList(nn.Embedding(WORDS, WIDTH, sparse=True) for _ in range(2))

    def forward(self, tokens, which):
        return sum(self.tables[number](tokens) for number in which)


def test_ranks_without_a_gradient(world, agree):
    """A model of sparse gradients alone; one only on rank 0, one nowhere."""
    model = mpiddl.DataParallel(Two())
    model(tokens_of(world.rank), [0]).sum().backward()
    agree(model.module.tables[1].weight.grad is None)

    model.zero_grad()
    model(tokens_of(world.rank), [0, 1] if world.rank == 0 else [0]).sum().backward()

    other = Two()
    (other(tokens_of(0), [1]).sum() / world.size).backward()
    got = model.module.tables[1].weight.grad
    agree(torch.allclose(got.to_dense(), other.tables[1].weight.grad.to_dense()))


@pytest.mark.parametrize(
    "stepper", [torch.optim.SGD, torch.optim.SparseAdam], ids=["SGD", "SparseAdam"]
)
def test_training_with_optimizers(world, agree, stepper):
    model, want = mpiddl.DataParallel(Two(), check_replicas_every=1), Two()
    optimizers = [stepper(m.parameters(), lr=0.1) for m in (model, want)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(tokens_of(world.rank, step), [0]).square().sum().backward()
        for rank in range(world.size):
            (want(tokens_of(rank, step), [0]).square().sum() / world.size).backward()
        for optimizer in optimizers:
            optimizer.step()
    agree(torch.allclose(model.module.tables[0].weight, want.tables[0].weight, atol=1e-5))
    mpiddl.replicas.check(model)


def test_bf16_is_rounded_once(world, agree):
    model = mpiddl.DataParallel(make_model(torch.bfloat16))
    local = copy.deepcopy(model.module)
    grads = []
    for rank in range(world.size):
        local.zero_grad()
        loss_of(local, tokens_of(rank)).backward()
        grads.append(local[0].weight.grad.to_dense().float())
    loss_of(model, tokens_of(world.rank)).backward()

    want = sum(grad / world.size for grad in grads)
    got = model.module[0].weight.grad.to_dense().float()
    agree(((got - want).abs() <= want.abs() * 2**-8).all())


def test_a_sparse_gradient_of_a_dense_parameter_is_refused_by_name(world, agree):
    model = mpiddl.DataParallel(nn.Sequential(nn.Embedding(4, 2)))
    model.module[0].sparse = True
    with pytest.raises(GradientError, match=r"'0.weight' is sparse.*before wrapping"):
        model(torch.tensor([1])).sum().backward()
    agree(True)


def test_a_dense_gradient_of_a_sparse_parameter_is_refused_by_name(world, agree):
    model = mpiddl.DataParallel(nn.Sequential(nn.Embedding(4, 2, sparse=True)))
    model.module[0].sparse = False
    with pytest.raises(GradientError, match=r"'0.weight', .* is not sparse.*sparse=False"):
        model(torch.tensor([1])).sum().backward()
    agree(True)


def test_sparse_on_one_rank_only(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    with pytest.raises(MismatchError, match=r"'weight: .*trained, sparse' on rank 0"):
        mpiddl.DataParallel(nn.Embedding(4, 2, sparse=world.rank == 0))
    agree(True)


def test_not_finite_values_are_found(world, agree):
    model = mpiddl.DataParallel(Two(), nan_check="error")
    with pytest.raises(GradientError, match=rf"rank {world.rank} on .*'tables.0.weight' holds NaN"):
        (model(tokens_of(0), [0]).sum() * float("nan")).backward()
    agree(True)
