"""``join``: ranks run out of batches at different times, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mpiddl.api.all_gather import all_gather
from mpiddl.api.all_reduce import all_reduce
from mpiddl.comm.world import World
from mpiddl.strategies.replica import broadcast_state
from mpiddl.strategies.weights import attend
from mpiddl.training.data_parallel import DataParallel
from mpiddl.training.join.announcements import (
    Announcements,
    Joinable,
    Operation,
    announcements_of,
)
from mpiddl.training.join.optimizer_state import Stateful, broadcast_plain_state
from mpiddl.training.sync_batch_norm import SyncBatchNorm

__all__ = ["join"]

MOST_MODELS = 62  # bits of an integer


@contextmanager
def join(
    *models: torch.nn.Module,
    optimizers: Sequence[Stateful] = (),
    divide_by_world_size: bool = False,
) -> Iterator[None]:
    """Let every rank train on as many batches as it has.

        with mpiddl.join(model, optimizers=[optimizer]):
            for x, y in loader:  # of another length on every rank
                optimizer.zero_grad()
                loss_of(model(x), y).backward()
                optimizer.step()

    Collective. A rank that leaves the block early takes part, with nothing of its own, in what
    the others still do, until all have left. Then the models, and what ``optimizers`` holds,
    become on every rank what they are on one that left last.

    Gradients are means over the ranks that still train. Inside ``model.batch(local=len(x))``,
    whose ``total`` may be left out here, they are means over all samples. Gradients that a rank
    has gathered under ``no_sync`` when it leaves count, with this rank, in the next backward that
    is reduced.

    Inside the block each rank may call the models, their backward, optimizers and whatever sends
    nothing. Collectives of your own (``all_reduce``, ``replicas.check``) belong outside: ranks
    that have left would not take part.

    Args:
        models: The ``DataParallel`` models that are trained in the block, all on the same ranks;
            in the same order on every rank.
        optimizers: Other things that must be equal afterwards: optimizers, learning rate
            schedulers, anything with ``state_dict`` and ``load_state_dict`` of tensors and plain
            values.
        divide_by_world_size: Divide gradients by the number of all ranks, also when some have
            left, as torch's DDP does by default; for one backward per step.

    Raises:
        ValueError: Something else than DataParallel models on the same ranks, or another ``join``
            on these ranks is not over.
        MismatchError: Inside the block: ranks do different things.
    """
    announcements = Announcements(_world_of(models), _checked(models), divide_by_world_size)
    world = announcements.world
    for model in announcements.models:
        model.begin_together()
    attend(world, announcements)
    try:
        yield
        # Not after an exception: the others could not be told of it here. It ends the job.
        _shadow(announcements)
    finally:
        attend(world, None)
    wrapped = [model for model in models if isinstance(model, DataParallel)]  # they all are
    _make_equal(announcements, wrapped, optimizers)


def _world_of(models: Sequence[torch.nn.Module]) -> World:
    if not models:
        raise ValueError("mpiddl.join() needs the models that are trained in its block")
    worlds = {id(world): world for world in (getattr(model, "world", None) for model in models)}
    if len(worlds) > 1:
        raise ValueError("mpiddl.join() got models on different ranks; join each group's apart")
    world = worlds.popitem()[1]
    if isinstance(world, World) and announcements_of(world) is not None:
        raise ValueError(
            "mpiddl.join() inside another one on the same ranks: pass all models to one, "
            "join(model, other)"
        )
    return world  # type: ignore[return-value] # _checked() looks at the models


def _checked(models: Sequence[torch.nn.Module]) -> list[Joinable]:
    if len(models) > MOST_MODELS:
        raise ValueError(f"mpiddl.join() got {len(models)} models, {MOST_MODELS} is the most")
    checked: list[Joinable] = []
    for model in models:
        if not isinstance(model, DataParallel):
            raise ValueError(
                f"mpiddl.join() takes models wrapped in mpiddl.DataParallel, got a "
                f"{type(model).__name__}"
            )
        for name, layer in model.named_modules():
            if isinstance(layer, SyncBatchNorm) and layer.ranks() is not model.world:
                raise ValueError(
                    f"layer {name!r} takes its statistics over other ranks than the model's; "
                    "inside join() ranks that have left would not take part"
                )
        checked.append(model.replica)
    return checked


def _shadow(announcements: Announcements) -> None:
    """Take part in what the other ranks do, until all have left."""
    world = announcements.world
    while True:
        heard = announcements.announce(Operation.LEFT)
        if heard.operation is Operation.LEFT:
            return
        if heard.operation is Operation.ALL_GATHER:
            row = torch.zeros(heard.subject, dtype=torch.float64)
            all_gather(row.new_empty(world.size, heard.subject), row, world=world)
        elif heard.operation is Operation.SUM:
            all_reduce(torch.zeros(heard.subject, dtype=torch.float64), world=world)
        elif heard.operation is Operation.BEGIN:
            # Buckets are in flight from now on; between here and FINISH others may be announced.
            announcements.models[heard.subject].shadow_begin(announcements.weight(heard))
        else:
            announcements.models[heard.subject].shadow_finish()


def _make_equal(
    announcements: Announcements,
    models: Sequence[DataParallel],
    optimizers: Sequence[Stateful],
) -> None:
    """Give every rank the state of a rank that left last."""
    for model in models:
        model.synchronize()  # what an OverlappedOptimizer still owes
        broadcast_state(model, announcements.world, announcements.root)
    for optimizer in optimizers:
        broadcast_plain_state(optimizer, announcements.world, announcements.root)
