"""One seed for everything, with a random stream per rank where ranks must differ."""

from __future__ import annotations

import random

import numpy
import torch

__all__ = ["seed"]


def seed(value: int, rank: int | None = None) -> None:
    """Seed Python's, numpy's and torch's global random generators.

    Args:
        value: The job's seed, the same on every rank.
        rank: None gives every rank the same stream: call it before the model is built, so that
            all replicas start alike. ``world.rank`` gives each rank one of its own: call it
            after wrapping, so that dropout and augmentation differ between ranks.

    Raises:
        ValueError: ``value`` or ``rank`` is negative.
    """
    if value < 0 or (rank is not None and rank < 0):
        raise ValueError(f"seed and rank must not be negative, got {value} and {rank}")
    entropy = [value] if rank is None else [value, rank + 1]
    states = numpy.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(states[0]))
    numpy.random.seed(int(states[1]))
    torch.manual_seed(int(states[2]) << 32 | int(states[3]))
