"""Tensors of all ranks compared by their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpiddl.base.plain import digest
from mpiddl.errors import ReplicaError
from mpiddl.gradients.agreement import odd_ones

__all__ = ["refuse_difference"]


def refuse_difference(
    named: Mapping[str, torch.Tensor], gather_json: Callable[[Any], list[Any]]
) -> None:
    """Stop on every rank if these tensors are not the same bits on all. Collective.

    Compares one checksum; only if it differs, one per tensor.

    Args:
        named: Names and tensors of this rank.
        gather_json: Gives a list of every rank's value to every rank.

    Raises:
        ReplicaError: Names the ranks and the first tensor that differs.
    """
    checksums = {name: digest(tensor) for name, tensor in named.items()}
    whole = hashlib.blake2b(repr(checksums).encode(), digest_size=16).hexdigest()
    if not odd_ones(gather_json(whole)):
        return
    everyones = gather_json(checksums)
    for name in {name: None for theirs in everyones for name in theirs}:
        odd = odd_ones([theirs.get(name) for theirs in everyones])
        if odd:
            raise ReplicaError(
                f"replicas differ: {name!r} on rank {', '.join(map(str, odd))} is not what the "
                "others have. Was it changed outside the optimizer, seeded per rank after "
                "wrapping, or loaded on some ranks only?"
            )
