"""Writes checkpoints."""

from __future__ import annotations

import importlib.metadata
import operator
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpiddl.api.barrier import barrier
from mpiddl.api.fail_together import Tick, raise_together, work_together
from mpiddl.api.objects import broadcast_json, gather_json
from mpiddl.base.log import logger
from mpiddl.base.plain import encode, gapless, place_of
from mpiddl.checkpoint.folders import begin_folder, finish_folder, remove_old
from mpiddl.checkpoint.generators import random_state
from mpiddl.checkpoint.index import RANDOM, Index, write_index
from mpiddl.checkpoint.own import (
    PARTS,
    differences,
    digests,
    in_turn,
    name_of,
    receive,
    send,
)
from mpiddl.checkpoint.tensors import (
    Kind,
    TensorWriter,
    check_storable,
    file_name,
    in_file_order,
    kind_of,
    shares_of_writers,
    write_tensors,
)
from mpiddl.collectives.channel import Channel, bytes_of
from mpiddl.comm.world import World, current_world
from mpiddl.errors import CheckpointError
from mpiddl.launch import library

__all__ = ["save"]

RANKS = "ranks.safetensors"


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
    are, versions, and what the model and ``mpiddl tune`` had found out by measuring. It may take as
    long as it takes: writing is progress to the watchdog of every rank.

    Args:
        folder: Where checkpoints are, on a file system that every node sees if ``sharded``.
        step: Of the job; names the checkpoint.
        keep: The newest so many are kept.
        sharded: Each rank writes its part of the tensors that are the same on all, and what is its
            own; else rank 0 writes all of them.
        world: The ranks; default those of ``mpiddl.init()``.
        parts: By name: whatever has a ``state_dict()`` (model, optimizer, scheduler, sampler,
            GradScaler), or such a state, or plain values. What is the same on all ranks is stored
            once; of what differs (a rank's running statistics, its place in a stream) each rank
            gets its own back.

    Returns:
        The checkpoint's folder, on every rank.

    Raises:
        CheckpointError: On every rank: it could not be written. Those before it are still there,
            and nothing is left of this one.
        ValueError: ``step`` is negative, or ``keep`` not positive.
        TypeError: A part holds something else than tensors and plain values.
    """
    world = world or current_world()
    step = operator.index(step)
    if step < 0 or keep < 1:
        raise ValueError(f"step={step} must not be negative, keep={keep} must be positive")
    folder = Path(folder)
    encoded, tensors = _encode_together(folder, parts, world)
    contents = _share_out(encoded, tensors, sharded, world)
    path = _begin(folder, step, world)
    try:
        files = [*_write(path, folder, contents, world), *_collect(path, folder, contents, world)]
        index = Index(
            step=step,
            parts=encoded,
            strides=[list(gapless(tensor).stride()) for tensor in tensors],
            files=files,
            nodes=[list(ranks) for ranks in world.layout.nodes],
            choices={**_choices(parts), "tuned": [list(choice) for choice in world.tuned]},
            versions=_versions(),
            plain=[name for name, part in parts.items() if not hasattr(part, "state_dict")],
        )
        return _finish(path, folder, index, keep, world)
    except BaseException as error:
        if world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # the disk may be full
        if isinstance(error, CheckpointError):  # on every rank: none is to see what is removed
            barrier(world=world)
        raise


def _encode_together(
    folder: Path, parts: dict[str, Any], world: World
) -> tuple[Any, list[torch.Tensor]]:
    """This rank's states as JSON and tensors; an error on every rank if one cannot give them."""
    encoded, tensors, problem = None, list[torch.Tensor](), None
    try:
        states: dict[str | None, Any] = {name: _state_of(part) for name, part in parts.items()}
        states[RANDOM] = random_state(world.device)
        encoded, tensors = encode(states, "the checkpoint")
        for number, tensor in enumerate(tensors):
            check_storable(tensor, f"the checkpoint{place_of(number, encoded)}")
    except Exception as error:
        problem = error
    try:
        raise_together(_told(folder, problem) if problem else None, world, CheckpointError)
    except CheckpointError:
        if isinstance(problem, TypeError):  # as of a call that was wrong
            raise problem from None
        raise
    return encoded, tensors


def _state_of(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else part


class _Contents(NamedTuple):
    """What goes into the files.

    Attributes:
        mine: What this rank writes, by name.
        own: What is a rank's own and sent to rank 0, which writes it: names and kinds, the same on
            every rank.
        sent: This rank's part of these, by name.
    """

    mine: dict[str, torch.Tensor]
    own: dict[str, Kind]
    sent: dict[str, torch.Tensor]


def _share_out(encoded: Any, tensors: list[torch.Tensor], sharded: bool, world: World) -> _Contents:
    """Who writes what. Collective."""
    mine = digests(encoded, tensors)
    found = differences(encoded, tensors, mine, broadcast_json(mine, world=world))
    own = {name_of(world.rank, what): tensor for what, tensor in found.items()}
    told = gather_json(
        [[what for what in found if what != PARTS], {n: kind_of(t) for n, t in own.items()}],
        world=world,
    )
    owners = shares_of_writers([t.nbytes for t in tensors], world.size if sharded else 1)
    for number in {number for numbers, _ in told for number in numbers if number < len(owners)}:
        owners[number] = 0  # others have something else under this number
    shared = {str(at): tensors[at] for at, owner in enumerate(owners) if owner == world.rank}
    if sharded:
        return _Contents({**shared, **own}, {}, {})
    kinds = {name: Kind(*kind) for _, theirs in told for name, kind in theirs.items()}
    return _Contents(shared, {name: kinds[name] for name in in_file_order(kinds)}, own)


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


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(_told(folder, error)) from error


def _begin(folder: Path, step: int, world: World) -> Path:
    def begin(tick: Tick) -> str | None:
        if world.rank != 0:
            return None
        with _telling(folder):
            return os.fspath(begin_folder(folder, step, tick))

    return Path(broadcast_json(work_together(begin, world, CheckpointError), world=world))


def _write(path: Path, folder: Path, contents: _Contents, world: World) -> list[tuple[str, str]]:
    """Every rank its file. Returns: name and checksum of all of them."""

    def write(tick: Tick) -> tuple[str, str] | None:
        if not contents.mine and world.rank != 0:
            return None
        with _telling(folder):
            name = file_name(world.rank)
            return name, write_tensors(path / name, contents.mine, tick)

    written = gather_json(work_together(write, world, CheckpointError), world=world)
    return [(name, checksum) for name, checksum in filter(None, written)]


def _collect(path: Path, folder: Path, contents: _Contents, world: World) -> list[tuple[str, str]]:
    """What is a rank's own goes to rank 0, which writes it. Returns: as ``_write``, on rank 0."""
    if not contents.own:
        return []
    file = _OwnFile(path / RANKS, contents.own) if world.rank == 0 else None

    def pass_on(owner: int, name: str, kind: Kind, channel: Channel) -> None:
        if file is None:
            send(bytes_of(contents.sent[name].cpu().contiguous()), 0, channel)
            return
        tensor = torch.empty(tuple(kind.shape), dtype=kind.dtype, device="cpu")
        receive(bytes_of(tensor), owner, channel)
        file.write(tensor)

    in_turn(world, contents.own.items(), pass_on)
    problem, checksum = (None, "") if file is None else file.finish()
    raise_together(_told(folder, problem) if problem else None, world, CheckpointError)
    return [(RANKS, checksum)]


class _OwnFile:
    """A file whose errors are kept until all have sent what they have: others wait meanwhile."""

    def __init__(self, path: Path, kinds: dict[str, Kind]) -> None:
        self._problem: OSError | None = None
        self._writer: TensorWriter | None = None
        try:
            self._writer = TensorWriter(path, kinds)
        except OSError as error:
            self._problem = error

    def write(self, tensor: torch.Tensor) -> None:
        if self._writer is not None and self._problem is None:
            try:
                self._writer.write(tensor)
            except OSError as error:
                self._problem = error

    def finish(self) -> tuple[OSError | None, str]:
        """What went wrong, and the checksum."""
        if self._writer is None:
            return self._problem, ""
        with closing(self._writer):
            if self._problem is not None:
                return self._problem, ""
            try:
                return None, self._writer.finish()
            except OSError as error:
                return error, ""


def _finish(path: Path, folder: Path, index: Index, keep: int, world: World) -> Path:
    def finish(tick: Tick) -> str | None:
        if world.rank != 0:
            return None
        with _telling(folder):
            write_index(path, index)
            final = finish_folder(path, folder, index.step)
        try:
            remove_old(folder, keep, final, tick)
        except OSError as error:
            logger.warning("old checkpoints in %s cannot be removed: %s", folder, error.strerror)
        return os.fspath(final)

    return Path(broadcast_json(work_together(finish, world, CheckpointError), world=world))
