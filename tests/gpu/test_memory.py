"""What thousands of steps leave behind: nothing."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from torch import nn

import mpiddl
from mpiddl.errors import GpuMemoryError

STEPS = 2000
MIB = 1 << 20


def model_of(world, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)]
    return mpiddl.DataParallel(nn.Sequential(*layers).to(world.device), **options)


def train(model, world, steps, optimizer):
    x = torch.randn(16, 64, device=world.device)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        mpiddl.all_reduce(torch.ones(1000, device=world.device), async_=True).wait()


def kept(gpu, world):
    """What this rank has; GPU memory is that of all ranks that share it."""
    gc.collect()
    torch.cuda.current_stream().synchronize()
    mpiddl.barrier()
    free, _ = torch.cuda.mem_get_info(world.device)
    found = {
        "GPU memory": -free,
        "torch's memory": torch.cuda.memory_allocated(world.device),
        "host memory": psutil.Process().memory_info().rss,
        "events": len(gpu._events.free),
    }
    mpiddl.barrier()
    return found


@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_two_thousand_steps(world, agree, gpu, engine, overlaps):
    model = model_of(world, engine=engine, bucket_size="128KiB")
    optimizer = (
        mpiddl.OverlappedOptimizer(torch.optim.Adam, model)
        if overlaps
        else torch.optim.Adam(model.parameters())
    )
    train(model, world, 300, optimizer)
    before = kept(gpu, world)
    train(model, world, STEPS, optimizer)
    after = kept(gpu, world)

    allowed = {
        "GPU memory": 8 * MIB,
        "torch's memory": MIB,
        "host memory": 16 * MIB,
        "events": 100,
    }
    grown = {what: after[what] - before[what] for what in before}
    agree(all(grown[what] <= most for what, most in allowed.items()), grown)
    agree(after["events"] < 1000, f"{after['events']} events for some buckets")
    model.synchronize()
    mpiddl.replicas.check(model)


def test_wrapped_again_and_again(world, agree, gpu):
    """Buckets go with their model, at the latest when the next one is wrapped."""

    def come_and_go():
        model = model_of(world)
        train(model, world, 2, torch.optim.SGD(model.parameters(), lr=0.1))
        model.unwrap()

    for _ in range(5):
        come_and_go()
    before = kept(gpu, world)
    for _ in range(40):
        come_and_go()
    grown = {what: value - before[what] for what, value in kept(gpu, world).items()}
    agree(grown["GPU memory"] <= 16 * MIB, grown)


def test_no_memory_says_how_much_on_every_rank(world, agree):
    """The last rank has taken what there was."""
    module = nn.Linear(8192, 8192, bias=False, device=world.device)  # 256 MiB
    mpiddl.barrier()
    hog = None
    if world.rank == world.size - 1:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(world.device)
        hog = torch.empty(free - 100 * MIB, dtype=torch.uint8, device=world.device)
    mpiddl.barrier()
    try:
        with pytest.raises(GpuMemoryError, match=r"rank \d+: ") as error:
            mpiddl.DataParallel(module)
    finally:
        del hog
        torch.cuda.empty_cache()
    agree("MiB of float32" in str(error.value) and "buckets" in str(error.value), error.value)
    model = mpiddl.DataParallel(module)  # now there is room
    model(torch.ones(2, 8192, device=world.device)).sum().backward()
    agree(bool((model.module.weight.grad == 2).all()))
