"""Opens checkpoints: rank 0 finds and checks one, all ranks know what is in it."""

from __future__ import annotations

import os
from pathlib import Path

from mpiddl.api.fail_together import Tick, raise_together, work_together
from mpiddl.api.objects import broadcast_json
from mpiddl.checkpoint.folders import checkpoints, newest
from mpiddl.checkpoint.index import INDEX, Index, read_index
from mpiddl.checkpoint.own import PARTS
from mpiddl.checkpoint.tensors import Kind, Stored, stored_tensors
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer
from mpiddl.errors import CheckpointError

__all__ = ["Found", "open_together"]


class Found:
    """A checkpoint, as all ranks know it.

    Args:
        path: Its folder.
        index: What is in it.
        kinds: Of each tensor in its files, by name.
        stored: Where each of them is, on rank 0.
        world: The ranks.
    """

    def __init__(
        self,
        path: Path,
        index: Index,
        kinds: dict[str, Kind],
        stored: dict[str, Stored],
        world: World,
    ) -> None:
        self.path = path
        self.index = index
        self.has_own = any("." in name for name in kinds)
        self.shared = {int(name): kind for name, kind in kinds.items() if "." not in name}
        as_many = sum(map(len, index.nodes)) == world.size
        self.own = {name: kind for name, kind in kinds.items() if "." in name and as_many}
        self._stored = stored
        self._problem: str | None = None

    def kinds_of(self, rank: int) -> dict[int, Kind]:
        """Of each tensor of this rank, by number."""
        own = {
            int(what): kind
            for owner, what, kind in map(_split, self.own.items())
            if owner == rank and what != PARTS
        }
        return {**self.shared, **own}

    def strides_of(self, rank: int) -> dict[int, list[int]]:
        """Of each tensor of this rank whose strides were written down."""
        kinds = self.kinds_of(rank)
        known = enumerate(self.index.strides)
        return {at: strides for at, strides in known if kinds.get(at) == self.shared.get(at)}

    def read(self, name: int | str, piece: Buffer, start: int = 0) -> None:
        """On rank 0: fill ``piece`` with bytes of a tensor. What goes wrong is kept until all ranks
        have got what they wait for."""
        try:
            if self._problem is None:
                self._stored[f"{name}"].read(piece, start)
        except OSError as error:
            self._problem = f"{self.path}: {error.strerror}"
        except (CheckpointError, LookupError) as error:
            self._problem = f"{self.path} is broken: {error}"

    def raise_problem(self, world: World) -> None:
        """Raises: CheckpointError: On every rank, if one could not read."""
        raise_together(self._problem, world, CheckpointError)


def _split(entry: tuple[str, Kind]) -> tuple[int, str, Kind]:
    """A name of a rank's own tensor as rank and number."""
    owner, _, what = entry[0].partition(".")
    return int(owner), what, entry[1]


def open_together(folder: Path, world: World) -> Found | None:
    """Rank 0 finds and checks it, and tells the others."""

    def find(tick: Tick) -> tuple[Path, Index, dict[str, Stored]] | None:
        try:
            path = _find(folder, tick) if world.rank == 0 else None
            if path is None:
                return None
            index, stored = read_index(path), {}
            for name, _ in index.files:
                stored.update(stored_tensors(path / name))
            return path, index, stored
        except OSError as error:
            raise CheckpointError(f"{folder}: {error.strerror}") from None

    found, told = work_together(find, world, CheckpointError), None
    if found is not None:
        path, index, stored = found
        told = [os.fspath(path), vars(index), {name: at.kind for name, at in stored.items()}]
    told = broadcast_json(told, world=world)
    if told is None:
        return None
    path, facts, kinds = told
    kinds = {name: Kind(*kind) for name, kind in kinds.items()}
    return Found(Path(path), Index(**facts), kinds, {} if found is None else found[2], world)


def _find(folder: Path, tick: Tick) -> Path | None:
    if not (folder / INDEX).exists():
        found = newest(folder, tick)
        if found is None and checkpoints(folder):
            raise CheckpointError(
                f"none of the checkpoints in {folder} can be read; remove them to begin anew"
            )
        return found
    read_index(folder).verify(folder, tick)
    return folder
