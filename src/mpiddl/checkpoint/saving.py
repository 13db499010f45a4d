"""Writes checkpoints."""

from __future__ import annotations

import importlib.metadata
import operator
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from mpiddl.checkpoint.folders import begin_folder, finish_folder, remove_old
from mpiddl.checkpoint.generators import random_state
from mpiddl.checkpoint.index import Index, write_index
from mpiddl.checkpoint.tensors import file_name, shares_of_writers, write_tensors
from mpiddl.comm import library
from mpiddl.comm.world import World, current_world
from mpiddl.errors import CheckpointError
from mpiddl.log import logger
from mpiddl.overlap.calls import broadcast_json, gather_json
from mpiddl.overlap.together import raise_together
from mpiddl.plain import encode, gapless

__all__ = ["save"]


def save(
    folder: str | Path,
    step: int,
    *,
    keep: int = 3,
    sharded: bool = False,
    world: World | None = None,
    **parts: Any,
) -> Path:
    """Write a checkpoint: the states of ``parts``, and of every rank's random generators.

    Collective. It is written under another name, flushed to disk with all its checksums, and then
    renamed: whoever is killed at whatever moment, the one before it stays. Stored too: where ranks
    are, versions, and what the model and ``mpiddl tune`` had found out by measuring.

    Args:
        folder: Where checkpoints are, on a file system that every node sees if ``sharded``.
        step: Of the job; names the checkpoint.
        keep: The newest so many are kept.
        sharded: Each rank writes its part of the tensors, which are the same on all; else rank 0
            writes all of them.
        world: The ranks; default those of ``mpiddl.init()``.
        parts: By name: whatever has a ``state_dict()`` (model, optimizer, scheduler, sampler,
            GradScaler), or such a state, or plain values; on every rank the same.

    Returns:
        The checkpoint's folder, on every rank.

    Raises:
        CheckpointError: On every rank: it could not be written; those before it are still there.
        ValueError: ``step`` is negative, or ``keep`` not positive.
        TypeError: A part holds something else than tensors and plain values.
    """
    world = world or current_world()
    step = operator.index(step)
    if step < 0 or keep < 1:
        raise ValueError(f"step={step} must not be negative, keep={keep} must be positive")
    states = {name: _state_of(part) for name, part in parts.items()}
    encoded, tensors = encode(states, "the checkpoint")
    folder = Path(folder)
    path = _begin(folder, step, world)
    owners = shares_of_writers([t.nbytes for t in tensors], world.size if sharded else 1)
    file = _write(path, folder, tensors, owners, world)
    facts = gather_json([file, random_state(world.device)], 0, world=world) or []
    choices = _choices(parts)
    index = Index(
        step=step,
        parts=encoded,
        tensors=owners,
        strides=[list(gapless(tensor).stride()) for tensor in tensors],
        files=[tuple(written) for written, _ in facts if written is not None],
        nodes=[list(ranks) for ranks in world.layout.nodes],
        random=[state for _, state in facts],
        choices={**choices, "tuned": [list(choice) for choice in world.tuned]},
        versions=_versions(),
    )
    return _finish(path, folder, index, keep, world)


def _state_of(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else part


def _choices(parts: dict[str, Any]) -> dict[str, Any]:
    """What parts have found out by measuring, by name."""
    able = {name: part for name, part in parts.items() if hasattr(part, "adopt_choices")}
    return {name: part.choices() for name, part in able.items()}


def _versions() -> dict[str, str]:
    return {
        "mpiddl": importlib.metadata.version("mpiddl"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mpi": str(library.describe()["library"]),
    }


def _told(folder: Path, error: Exception) -> str:
    """What an error was, as users can act on it."""
    reason = getattr(error, "strerror", None) or f"{error}" or type(error).__name__
    return f"no checkpoint was written to {folder}: {reason}; those before it are kept"


def _begin(folder: Path, step: int, world: World) -> Path:
    path, problem = None, None
    if world.rank == 0:
        try:
            path = begin_folder(folder, step)
        except OSError as error:
            problem = _told(folder, error)
    path, problem = broadcast_json([path and os.fspath(path), problem], world=world)
    if problem is not None:
        raise CheckpointError(problem, on_every_rank=True)
    return Path(path)


def _write(
    path: Path, folder: Path, tensors: list[torch.Tensor], owners: list[int], world: World
) -> tuple[str, str] | None:
    """Every rank its file; an error on all of them if one could not."""
    problem, file = None, None
    try:
        file = _write_own(path, tensors, owners, world)
    except Exception as error:  # a dtype that safetensors does not know, say: others must hear
        problem = _told(folder, error)
    try:
        raise_together(problem, world, CheckpointError)
    except CheckpointError:
        if world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # the disk may be full
        raise
    return file


def _write_own(
    path: Path, tensors: list[torch.Tensor], owners: list[int], world: World
) -> tuple[str, str] | None:
    """This rank's file: name and checksum; None if it writes none."""
    mine = {at: tensors[at] for at, owner in enumerate(owners) if owner == world.rank}
    if world.rank > max(owners, default=0):
        return None
    name = file_name(world.rank)
    return name, write_tensors(path / name, mine)


def _finish(path: Path, folder: Path, index: Index, keep: int, world: World) -> Path:
    final, problem = None, None
    if world.rank == 0:
        try:
            write_index(path, index)
            final = finish_folder(path, folder, index.step)
        except OSError as error:
            problem = _told(folder, error)
            shutil.rmtree(path, ignore_errors=True)
    if final is not None:
        try:
            remove_old(folder, keep, final)
        except OSError as error:
            logger.warning("old checkpoints in %s cannot be removed: %s", folder, error.strerror)
    raise_together(problem, world, CheckpointError)
    return Path(broadcast_json(final and os.fspath(final), world=world))
