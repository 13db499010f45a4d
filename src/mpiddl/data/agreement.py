"""Whether all ranks deal out the same data set in the same way."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from mpiddl.comm.world import World
from mpiddl.data.together import raise_together
from mpiddl.errors import DataError
from mpiddl.overlap.calls import gather_json

__all__ = ["checksum_of", "kind_of", "refuse_different", "refuse_unlike_data"]


def refuse_different(what: str, facts: Mapping[str, Any], world: World) -> None:
    """Raise DataError on every rank if ranks do not have the same ``facts``. Collective.

    Args:
        what: Which call it is about.
        facts: Plain JSON.
        world: The ranks.
    """
    everyones = gather_json(dict(facts), world=world)
    for name, first in everyones[0].items():
        for rank, other in enumerate(everyones):
            if other[name] != first:
                raise DataError(
                    f"{what}: ranks do not agree on {name}: rank 0 has {first}, rank {rank} has "
                    f"{other[name]}; every rank must pass the same",
                    on_every_rank=True,
                )


def refuse_unlike_data(
    dataset: Any, first: int, facts: Mapping[str, Any], options: Mapping[str, Any], world: World
) -> None:
    """As ``refuse_different``, for a data set and how it is dealt out. Collective.

    Args:
        dataset: None where only its length is known.
        first: A sample that this rank can read.
        facts: How it is dealt out; plain JSON.
        options: Likewise; of arrays checksums are compared.
        world: The ranks.
    """
    problem, kind = None, None
    try:
        if hasattr(dataset, "__getitem__"):
            kind = kind_of(dataset[first])
    except (OSError, ValueError, LookupError) as error:
        problem = f"the first sample cannot be read: {error!r}"
    raise_together(problem, world)
    given = {name: value for name, value in options.items() if value is not None}
    sums = {
        name: checksum_of(value) if hasattr(value, "__len__") else value
        for name, value in given.items()
    }
    samples = {"the kind of the samples": kind}
    refuse_different("ShardBatchSampler", {**facts, **sums, **samples}, world)


def checksum_of(values: Any) -> str:
    """Of labels, keys or weights: how many, and a checksum."""
    array = numpy.ascontiguousarray(values)
    raw = array.tobytes() if array.dtype.kind in "biuf" else str(array.tolist()).encode()
    return f"{len(array)} values with checksum {zlib.crc32(raw):08x}"


def kind_of(sample: Any) -> Any:
    """What a sample is made of: the dtype and the number of dimensions of each part."""
    if isinstance(sample, torch.Tensor | numpy.ndarray):
        return f"{sample.dtype} of {sample.ndim} dimensions".removeprefix("torch.")
    if isinstance(sample, Mapping):
        return {str(key): kind_of(value) for key, value in sample.items()}
    if isinstance(sample, list | tuple):
        return [kind_of(value) for value in sample]
    return type(sample).__name__
