"""NCCL: refused where ranks share a GPU, else right."""

from __future__ import annotations

import pytest
import torch
from samples import buffer_of, expected

import mpiddl
from mpiddl.collectives.nccl import NCCL_DTYPES, nccl_missing, nccl_problem
from mpiddl.errors import UnsupportedBufferError


@pytest.fixture
def nccl(world, gpu):
    if problem := nccl_problem(gpu, world) or nccl_missing():
        pytest.skip(problem)


def test_ranks_that_share_a_gpu_are_refused(world, agree):
    if world.gpu_sharers < 2:
        pytest.skip("each rank has a GPU to itself")
    with pytest.raises(UnsupportedBufferError, match="share"):
        mpiddl.all_reduce(torch.ones(3, device=world.device), algorithm="nccl")
    with pytest.raises(UnsupportedBufferError, match="share"):
        mpiddl.DataParallel(torch.nn.Linear(2, 2).to(world.device), algorithm="nccl")
    agree(True)


@pytest.mark.parametrize("name", NCCL_DTYPES)
@pytest.mark.parametrize("op", ["sum", "min", "max", "prod"])
def test_all_reduce(world, agree, nccl, name, op):
    dtype = getattr(torch, name)
    for length in (0, 1, 1000, 300_001):
        with torch.device(world.device):
            buffer = buffer_of(world.rank, length, dtype)
            want = expected(op, world.size, length, dtype)
        mpiddl.all_reduce(buffer, op, algorithm="nccl")
        agree(torch.equal(buffer, want), f"{length}: {buffer[:5]}, not {want[:5]}")


def test_many_in_flight(world, agree, nccl):
    buffers = [torch.full((1000 * n,), 1.0 + world.rank, device=world.device) for n in range(20)]
    works = [mpiddl.all_reduce(b, "mean", algorithm="nccl", async_=True) for b in buffers]
    for work in reversed(works):
        work.wait()
    want = (world.size + 1) / 2
    agree(all(bool(((b - want).abs() < 1e-6).all()) for b in buffers))


@pytest.mark.parametrize("engine", ["inline", "thread", "after"])
def test_gradients(world, agree, nccl, engine):
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).to(world.device)
    model = mpiddl.DataParallel(module, algorithm="nccl", engine=engine, bucket_size="10KiB")
    ours = mpiddl.DataParallel(
        torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).to(world.device),
        algorithm="ring",
    )
    ours.load_state_dict(model.state_dict())
    x = torch.full((4, 64), 1.0 + world.rank, device=world.device)
    for _ in range(3):
        for each in (model, ours):
            each.zero_grad()
            each(x).square().mean().backward()
        pairs = zip(model.parameters(), ours.parameters(), strict=True)
        agree(all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6) for a, b in pairs))
