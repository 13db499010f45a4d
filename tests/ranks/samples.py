"""Data whose reductions are exact, and oracles that need no MPI."""

from __future__ import annotations

import functools

import torch

FOLDS = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "prod": torch.mul,
}


def seeded(seed):
    """A generator on the device on which tests make their tensors."""
    return torch.Generator(torch.empty(0).device).manual_seed(seed)


def buffer_of(rank, length, dtype):
    """Small positive integers: sums and products of four are exact in every dtype but int8's."""
    return ((torch.arange(length) * 5 + rank * 3) % 4).to(dtype)


def expected(op, size, length, dtype):
    """What every rank must hold; integers wrap around as torch's do."""
    return functools.reduce(FOLDS[op], (buffer_of(rank, length, dtype) for rank in range(size)))
