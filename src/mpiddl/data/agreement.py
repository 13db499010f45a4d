"""Whether all ranks deal out the same data set in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch

from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World
from mpiddl.errors import DataError

__all__ = ["kind_of", "refuse_different", "refuse_unlike_samples"]


def refuse_different(what: str, facts: Mapping[str, Any], world: World) -> None:
    """Raise DataError on every rank if ranks do not have the same ``facts``. Collective.

    Args:
        what: Which call it is about.
        facts: Plain JSON.
        world: The ranks.
    """
    everyones = gather_json(dict(facts), world=world)
    for name in {name: None for each in everyones for name in each}:
        values = [each.get(name) for each in everyones]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise DataError(
                    f"{what}: ranks do not agree on {name}: rank 0 has {values[0]}, rank {rank} "
                    f"has {value}; every rank must pass the same",
                    on_every_rank=True,
                )


def refuse_unlike_samples(dataset: Any, first: int, problem: str | None, world: World) -> None:
    """As ``refuse_different``, for what samples are made of. Collective.

    Args:
        dataset: None where only its length is known.
        first: A sample that this rank can read.
        problem: What this rank has met already; then all ranks meet it.
        world: The ranks.
    """
    kind = None
    try:
        if problem is None and hasattr(dataset, "__getitem__"):
            kind = kind_of(dataset[first])
    except Exception as error:  # whatever a user's data set raises, here all ranks are told
        problem = f"the first sample cannot be read: {error!r}"
    raise_together(problem, world)
    refuse_different("ShardBatchSampler", {"the kind of the samples": kind}, world)


def kind_of(sample: Any) -> Any:
    """What a sample is made of: the dtype and the number of dimensions of each part."""
    if isinstance(sample, torch.Tensor | numpy.ndarray):
        return f"{sample.dtype} of {sample.ndim} dimensions".removeprefix("torch.")
    if isinstance(sample, Mapping):
        return {str(key): kind_of(value) for key, value in sample.items()}
    if isinstance(sample, list | tuple):
        return [kind_of(value) for value in sample]
    return type(sample).__name__
