"""Reads checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpiddl.checkpoint.folders import checkpoints, latest
from mpiddl.checkpoint.generators import set_random_state
from mpiddl.checkpoint.index import INDEX, Index, read_index
from mpiddl.checkpoint.tensors import read_tensors
from mpiddl.collectives.channel import bytes_of
from mpiddl.comm.tuning import Choice
from mpiddl.comm.world import World, current_world
from mpiddl.errors import CheckpointError
from mpiddl.log import logger
from mpiddl.overlap.calls import broadcast, broadcast_json
from mpiddl.overlap.together import raise_together
from mpiddl.plain import decode, renamed_as

__all__ = ["Checkpoint", "load"]


class Checkpoint(NamedTuple):
    """What was loaded.

    Attributes:
        step: At which it was saved.
        path: Its folder.
        values: The parts that have no ``load_state_dict``, by name.
        same_ranks: Whether as many ranks, on as many nodes, wrote it: random generators and
            choices made by measuring were restored.
    """

    step: int
    path: Path
    values: dict[str, Any]
    same_ranks: bool


def load(folder: str | Path, *, world: World | None = None, **parts: Any) -> Checkpoint | None:
    """Load the newest whole checkpoint into ``parts``. Collective.

    Rank 0 reads and checks it; the others get it as messages, so only rank 0's node needs to see
    the folder. Nothing is unpickled. On as many ranks and nodes as wrote it, every rank goes on
    with its random numbers, and what was found out by measuring counts again, instead of being
    measured anew.

    Args:
        folder: As ``save`` was given, or one checkpoint in it.
        world: The ranks; default those of ``mpiddl.init()``.
        parts: As ``save`` was given: what has a ``load_state_dict()`` is loaded. Of another part,
            None say, the value is returned.

    Returns:
        None, on every rank, if there is no checkpoint.

    Raises:
        CheckpointError: On every rank: it is of another job (a part is missing, or does not fit),
            or the one that was named is broken.
    """
    world = world or current_world()
    told, tensors, problem = None, [], None
    if world.rank == 0:
        try:
            found = _find(Path(folder))
            if found is not None:
                index = read_index(found)
                tensors = read_tensors(found, index)
                told = [os.fspath(found), vars(index), [_describe(tensor) for tensor in tensors]]
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
    told, problem = broadcast_json([told, problem], world=world)
    if problem is not None:
        raise CheckpointError(problem, on_every_rank=True)
    if told is None:
        return None
    path, facts, shapes = told
    if world.rank != 0:
        tensors = [
            torch.empty_strided(shape, strides, dtype=getattr(torch, name), device="cpu")
            for name, shape, strides in shapes
        ]
    for tensor in tensors:
        if tensor.numel():
            broadcast(bytes_of(tensor), world=world)
    return _restore(Path(path), Index(**facts), tensors, parts, world)


def _find(folder: Path) -> Path | None:
    if not (folder / INDEX).exists():
        found = latest(folder)
        if found is None and checkpoints(folder):
            raise CheckpointError(
                f"none of the checkpoints in {folder} can be read; remove them to begin anew"
            )
        return found
    read_index(folder).verify(folder)
    return folder


def _describe(tensor: torch.Tensor) -> tuple[str, list[int], list[int]]:
    name = str(tensor.dtype).removeprefix("torch.")
    return name, list(tensor.shape), list(tensor.stride())


def _restore(
    path: Path, index: Index, tensors: list[torch.Tensor], parts: dict[str, Any], world: World
) -> Checkpoint:
    problem, states = None, {}
    try:
        states = decode(index.parts, tensors)
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module) and isinstance(states.get(name), dict):
                states[name] = renamed_as(part.state_dict(), states[name])
        _refuse_others(path, states, parts)
        for name, part in parts.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(states[name])
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # whatever a part makes of a state that is another's
        problem = f"{path} does not fit this job: {error}"
    raise_together(problem, world, CheckpointError)
    same = index.nodes == [list(ranks) for ranks in world.layout.nodes]
    if same:
        set_random_state(index.random[world.rank], world.device)
        _adopt(index.choices, parts, world)
    elif world.rank == 0:
        logger.info(
            "%s was written by %d ranks on %d nodes: random numbers begin anew",
            path,
            sum(map(len, index.nodes)),
            len(index.nodes),
        )
    values = {
        name: state
        for name, state in states.items()
        if not hasattr(parts.get(name), "load_state_dict")
    }
    return Checkpoint(index.step, path, values, same)


def _refuse_others(path: Path, states: dict[str, Any], parts: dict[str, Any]) -> None:
    """Before anything is changed: a part that is missing, a model that is another one."""
    for name, part in parts.items():
        if name not in states:
            raise CheckpointError(f"{path} has no {name!r}, only {', '.join(states) or 'nothing'}")
        if isinstance(part, torch.nn.Module):
            _refuse_other_model(path, name, states[name], part.state_dict())


def _refuse_other_model(
    path: Path, name: str, stored: dict[str, Any], here: dict[str, Any]
) -> None:
    for key in [*stored, *here]:
        if key not in here or key not in stored:
            has, lacks = (
                ("the checkpoint", "this model")
                if key in stored
                else (
                    "this model",
                    "the checkpoint",
                )
            )
            raise CheckpointError(f"{path} is of another {name}: {has} has {key!r}, {lacks} not")
        one, other = stored[key], here[key]
        if isinstance(one, torch.Tensor) and (one.shape, one.dtype) != (other.shape, other.dtype):
            raise CheckpointError(
                f"{path} is of another {name}: {key!r} is {_words(one)} in the checkpoint, "
                f"{_words(other)} in this model"
            )


def _words(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _adopt(choices: dict[str, Any], parts: dict[str, Any], world: World) -> None:
    world.tuned = [Choice(*choice) for choice in choices.get("tuned", [])]
    for name, part in parts.items():
        if name in choices and hasattr(part, "adopt_choices"):
            part.adopt_choices(choices[name])
