"""How far 16-bit sums are from those in float64, with every algorithm."""

from __future__ import annotations

import pytest
import torch
from test_races import in_memory, usable

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS

ONCE = ("direct", "shared", "reference")
"""Add in float32 and round once."""
LEAST = 2.0**-24
"""float16's smallest step."""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("where", ["plain", "window"])
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_sums(world, agree, gpu, algorithm, dtype, where, op):
    usable(world, gpu, algorithm, where)
    if dtype not in ALGORITHMS[algorithm].dtypes:
        pytest.skip("refused, as other tests see")
    for length in (5, 4001, 1_000_003):
        inputs = [
            torch.randn(length, generator=torch.Generator().manual_seed(rank)).to(dtype)
            for rank in range(world.size)
        ]
        nbytes = length * dtype.itemsize
        buffer = in_memory(world, where, -(-nbytes // 4)).view(dtype)[:length]
        buffer.copy_(inputs[world.rank])

        mpiddl.all_reduce(buffer, op, algorithm=algorithm)

        scale = 1 / world.size if op == "mean" else 1.0
        exact = sum(value.double() for value in inputs) * scale
        sizes = sum(value.double().abs() for value in inputs) * scale
        eps = torch.finfo(dtype).eps
        bound = (world.size + 1) * eps / 2 * sizes
        if algorithm in ONCE and op == "sum":
            bound = eps / 2 * exact.abs() + (world.size + 1) * 2.0**-23 * sizes
        error = (buffer.cpu().double() - exact).abs()
        worst = float((error - bound).max())
        agree(bool((error <= 1.01 * bound + LEAST).all()), f"{length}: {worst} over the bound")
        everyones = mpiddl.gather_json(buffer.view(torch.uint8).cpu()[:4000].tolist())
        agree(all(bits == everyones[0] for bits in everyones), f"{length}: bits differ")
