"""Replicas stay equal, to the last bit."""

from __future__ import annotations

import hashlib

import torch

from mpiddl.buckets.agreement import odd_ones
from mpiddl.collectives.channel import bytes_of
from mpiddl.comm.world import World, current_world
from mpiddl.errors import ReplicaError
from mpiddl.overlap.calls import gather_json
from mpiddl.training.data_parallel import DataParallel
from mpiddl.training.state import gapless, named_state

__all__ = ["check"]


def check(model: torch.nn.Module, world: World | None = None) -> None:
    """Stop if replicas are not bitwise equal. Collective.

    Compares one checksum; only if it differs, one per parameter and buffer.

    Args:
        model: The model, wrapped or not.
        world: The ranks; default those of ``mpiddl.init()``.

    Raises:
        ReplicaError: On every rank; names the ranks and the first parameter that differs.
    """
    world = world or current_world()
    inner = model.module if isinstance(model, DataParallel) else model
    checksums = {name: _checksum(tensor) for name, tensor in named_state(inner)}
    whole = hashlib.blake2b("".join(checksums.values()).encode(), digest_size=16).hexdigest()
    if not odd_ones(gather_json(whole, world=world)):
        return
    everyones = gather_json(checksums, world=world)
    for name in checksums:
        odd = odd_ones([theirs.get(name) for theirs in everyones])
        if odd:
            raise ReplicaError(
                f"replicas differ: parameter {name!r} on rank {', '.join(map(str, odd))} is not "
                "what the others have. Was it changed outside the optimizer, seeded per rank "
                "after wrapping, or loaded on some ranks only?"
            )
    raise ReplicaError("replicas differ in their parameters' names")


def _checksum(tensor: torch.Tensor) -> str:
    data = bytes_of(gapless(tensor).cpu()).numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()
