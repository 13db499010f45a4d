"""Every op and dtype on the GPU gives what it gives on the host, wherever buffers begin."""

from __future__ import annotations

import functools

import pytest
import torch

import mpiddl
from mpiddl.bench.timing import wait_for
from mpiddl.collectives.reduction import DTYPES
from mpiddl.devices.cuda.kernels import MOST_SOURCES
from mpiddl.devices.host import HostDevice

OPS = ("sum", "prod", "min", "max")
LENGTHS = (1, 7, 33, 1000, 4099, 70_001)
MARGIN = 16


@functools.cache
def values(dtype, length, seed):
    """Of all kinds: large and small ones, infinities, NaN, subnormals."""
    random = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, (length,), generator=random, dtype=dtype)
    drawn = torch.randn(length, generator=random, dtype=torch.float64).to(dtype)
    info, odd = torch.finfo(dtype), torch.arange(length) * 7 + seed
    for place, value in enumerate([torch.inf, -torch.inf, torch.nan, info.tiny / 4, info.max]):
        drawn[odd % 101 == place] = value
    return drawn


def there(value, gpu_place, shift):
    """A copy on the GPU that begins ``shift`` elements behind a boundary."""
    memory = torch.zeros(len(value) + 2 * MARGIN, dtype=value.dtype, device=gpu_place)
    view = memory[MARGIN + shift :][: len(value)]
    view.copy_(value)
    return memory, view


def same(got, want):
    odd = want.isnan()
    return torch.equal(got.isnan(), odd) and torch.equal(
        got.masked_fill(odd, 5), want.masked_fill(odd, 5)
    )


def combined(gpu, op, sources, weights, targets):
    wait_for(gpu.settled())
    gpu.combine(op, sources, weights, targets)
    gpu.hand_back()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, MOST_SOURCES])
def test_as_on_the_host(world, agree, gpu, op, dtype, count):
    problems = []
    for length in LENGTHS:
        for shifts in ((0, 0), (3, 3), (1, 2)):  # on boundaries, all beside them, each its own way
            sources = [values(dtype, length, seed) for seed in range(count)]
            want = torch.empty_like(sources[0])
            HostDevice().combine(op, sources, None, [want])
            pairs = [there(s, world.device, shifts[n % 2]) for n, s in enumerate(sources)]
            memory, target = there(torch.zeros_like(want), world.device, shifts[0])
            views = [view for _, view in pairs]
            combined(gpu, op, views, None, [target, views[-1]])
            if not same(target.cpu(), want) or not same(views[-1].cpu(), want):
                problems.append((length, shifts, target[:5].tolist(), want[:5].tolist()))
            before, behind = memory[: MARGIN + shifts[0]], memory[MARGIN + shifts[0] + length :]
            if before.any() or behind.any():
                problems.append((length, shifts, "wrote beside the target"))
    agree(not problems, problems[:3])


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_weights(world, agree, gpu, dtype, count):
    """Within a rounding of float64's sum; a weight of 0 leaves NaN out."""
    problems, eps = [], torch.finfo(dtype).eps
    for length in LENGTHS:
        random = torch.Generator().manual_seed(length)
        sources = [
            torch.randn(length, generator=random, dtype=torch.float64).to(dtype)
            for _ in range(count)
        ]
        weights = [0.0 if count > 1 and n == 1 else 1 / (n + 3) for n in range(count)]
        exact = sum(s.double() * w for s, w in zip(sources, weights, strict=True))
        size = sum((s.double() * w).abs() for s, w in zip(sources, weights, strict=True))
        if count > 1:
            sources[1].fill_(torch.nan)
        views = [there(source, world.device, 1)[1] for source in sources]
        combined(gpu, "sum", views, weights, [views[0]])
        error = (views[0].cpu().double() - exact).abs()
        narrow = eps if dtype.itemsize > 2 else 2**-23
        least = 2.0**-25 if dtype.itemsize == 2 else 0.0
        bound = eps / 2 * exact.abs() + count * narrow * size + least
        if not bool((error <= bound).all()):
            problems.append((length, float((error - bound).max())))
    agree(not problems, problems)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
def test_scale_fold_and_copy(world, agree, gpu, dtype):
    for length in LENGTHS:
        one, other = values(dtype, length, 1), values(dtype, length, 2)
        _, mine = there(one, world.device, 1)
        _, theirs = there(other, world.device, 5)
        want = one.clone()
        HostDevice().fold("max", want, other, None)
        wait_for(gpu.settled())
        gpu.fold("max", mine, theirs, None)
        gpu.hand_back()
        agree(same(mine.cpu(), want), f"fold {length}")
        wait_for(gpu.settled())
        gpu.copy(theirs, mine)
        gpu.scale(mine, 0.0)
        gpu.hand_back()
        agree(same(theirs.cpu(), want) and not mine.cpu().any(), f"copy and scale {length}")


def test_an_address_beyond_32_bits(world, agree, gpu):
    """In the last elements of a large buffer, bytes and indices are beyond 2**31."""
    needed = 8 << 30  # of each rank that shares it
    if min(mpiddl.gather_json(torch.cuda.mem_get_info()[0])) < needed * world.gpu_sharers:
        pytest.skip("needs 8 GiB of free GPU memory for each rank")
    length = (1 << 31) + 5
    buffer = torch.ones(length, dtype=torch.uint8, device=world.device)
    combined(gpu, "sum", [buffer, buffer], None, [buffer])
    right = bool((buffer[-9:] == 2).all()) and int(buffer[:: 1 << 20].sum()) == 2 * 2049
    agree(right, buffer[-9:])
    del buffer
    torch.cuda.empty_cache()
