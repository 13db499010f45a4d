"""Replicas stay equal, to the last bit."""

from __future__ import annotations

import functools

import torch

from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World, current_world
from mpiddl.gradients.checksums import refuse_difference
from mpiddl.gradients.state import named_state
from mpiddl.training.data_parallel import DataParallel

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
    inner = model
    if isinstance(model, DataParallel):
        inner = model.module
        model.synchronize()
    named = named_state(inner) if buffers else inner.named_parameters()
    refuse_difference(dict(named), functools.partial(gather_json, world=world))
