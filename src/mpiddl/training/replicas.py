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


def check(model: torch.nn.Module, world: World | None = None, *, buffers: bool = False) -> None:
    """Stop if the parameters of the replicas are not bitwise equal. Collective.

    Compares one checksum; only if it differs, one per parameter.

    Args:
        model: The model, wrapped or not.
        world: The ranks; default those of ``mpiddl.init()``.
        buffers: Compare buffers too. (BatchNorm's running statistics are each rank's own.)

    Raises:
        ReplicaError: On every rank; names the ranks and the first parameter that differs.
    """
    world = world or current_world()
    inner = model.module if isinstance(model, DataParallel) else model
    named = named_state(inner) if buffers else inner.named_parameters()
    checksums = {name: _checksum(tensor) for name, tensor in named}
    whole = hashlib.blake2b(repr(checksums).encode(), digest_size=16).hexdigest()
    if not odd_ones(gather_json(whole, world=world)):
        return
    everyones = gather_json(checksums, world=world)
    for name in {name: None for theirs in everyones for name in theirs}:
        odd = odd_ones([theirs.get(name) for theirs in everyones])
        if odd:
            raise ReplicaError(
                f"replicas differ: {name!r} on rank {', '.join(map(str, odd))} is not what the "
                "others have. Was it changed outside the optimizer, seeded per rank after "
                "wrapping, or loaded on some ranks only?"
            )


def _checksum(tensor: torch.Tensor) -> str:
    """Of all that makes two tensors the same: bits, order in memory, shape, dtype."""
    flat = gapless(tensor).cpu()
    data = bytes_of(flat).numpy()
    layout = f"{flat.dtype} {tuple(flat.shape)} {flat.stride()}"
    return hashlib.blake2b(data.data, digest_size=16).hexdigest() + layout
