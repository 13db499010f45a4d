"""A data set of which every node holds one copy, that all its ranks and their workers read."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import gather_json
from mpiddl.base.segments import chunked, split
from mpiddl.base.units import format_bytes
from mpiddl.comm.windows import FOLDER
from mpiddl.comm.world import World, current_world
from mpiddl.data.moving.fields import Array, Field, bytes_of, kind_of, lay_out, views_of
from mpiddl.data.moving.node_stream import (
    PIECE_BYTES,
    Relay,
    check_same_root,
    reason_of,
    writers_of,
)
from mpiddl.data.moving.shared_files import SharedFile, remove_unused
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["NodeSharedDataset"]


class NodeSharedDataset(Dataset[tuple[torch.Tensor, ...]]):
    """Samples in memory that all ranks of a node share: one copy per node, not one per rank.

    Made like torch's ``TensorDataset``, and used like it. The copy is a file in shared memory, or
    in a folder of your choice, that a DataLoader's workers open by its name: they are sent the
    name, not the data. Tensors are views of the file and can only be read; to write to one ends
    the process with a segmentation fault, so transforms must make new tensors.

    The file goes when the last rank of its node has closed the data set, or has ended. After a
    job that was killed, the next data set that this user makes in that folder removes it.

    Collective. Usable as a context manager; leaving it closes the data set, not collectively.

    Args:
        arrays: numpy arrays (also memory-mapped ones) or torch tensors with the same first
            dimension, copied piece by piece. Ranks that have no data pass none, or None.
        world: The ranks; default those of ``mpiddl.init()``.
        folder: Of the file, on the node's own disk; default its shared memory.
        root: The rank that has the data, and sends it to the other nodes. None: the first rank of
            every node has it.

    Attributes:
        fields: Dtype, shape and place of each array.

    Raises:
        DataError: On every rank: what was passed is no such data, or a node has not the space.
    """

    @checks_world
    def __init__(
        self,
        *arrays: Array | World | None,
        world: World | None = None,
        folder: str | os.PathLike[str] | None = None,
        root: int | None = None,
    ) -> None:
        world = world or current_world()
        check_same_root(root, world)
        given = [array for array in arrays if not (array is None or isinstance(array, World))]
        self.fields = _agree(given, root, world)
        place = FOLDER if folder is None else Path(folder)
        file, views = _share(given, self.fields, place, root, world)
        self._path = file.path
        self._arrays: tuple[torch.Tensor, ...] | None = views
        self._release: Callable[[], object] = weakref.finalize(self, file.close)  # also at exit

    @property
    def arrays(self) -> tuple[torch.Tensor, ...]:
        """All samples, one tensor per array; they can only be read.

        Raises:
            DataError: The data set was closed.
        """
        if self._arrays is None:
            raise DataError("this data set was closed; make a new one")
        return self._arrays

    def __len__(self) -> int:
        return self.fields[0].shape[0]

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, ...]:
        """Sample ``index`` of every array; also a slice, or a list of indices, of samples."""
        arrays = self._arrays if self._arrays is not None else self.arrays
        return tuple([array[index] for array in arrays])

    def close(self) -> None:
        """Let go of the data; tensors that were taken out stay valid. Idempotent."""
        self._arrays = None
        self._release()

    def __enter__(self) -> NodeSharedDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs: it holds no lock, for its rank does."""
        return {"path": str(self._path), "fields": self.fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path, self.fields = Path(state["path"]), state["fields"]
        self._release = lambda: None
        try:
            self._arrays = views_of(self._path, self.fields)
        except OSError as error:
            raise DataError(
                f"cannot open a node-shared data set ({error}); keep it open on the rank for as "
                "long as its workers run, and on the same node"
            ) from None


def _agree(arrays: Sequence[Array], root: int | None, world: World) -> tuple[Field, ...]:
    """What those who have data have, the same on all. Collective."""
    sources = list(world.layout.firsts) if root is None else [root]
    who = "the first rank of every node" if root is None else f"the root, rank {root},"
    kinds: list[list[Any]] = []
    problem = None
    if world.rank not in sources:
        if arrays:
            problem = f"rank {world.rank} passed arrays, but only {who} passes them; pass None"
    elif not arrays:
        problem = f"rank {world.rank} passed no arrays; {who} must pass them"
    else:
        try:
            kinds = [kind_of(number, array) for number, array in enumerate(arrays)]
        except DataError as error:
            problem = str(error)
        lengths = [shape[0] for _, shape in kinds]
        if len(set(lengths)) > 1:
            problem = f"arrays have {lengths} samples; pass arrays with the same first dimension"
    raise_together(problem, world)
    everyones = gather_json(kinds, world=world)
    for rank in sources:
        if everyones[rank] != everyones[sources[0]]:
            raise DataError(
                f"the nodes of rank {sources[0]} and rank {rank} have different arrays, "
                f"{everyones[sources[0]]} and {everyones[rank]}; pass the same data on every "
                "node, or root=0",
                on_every_rank=True,
            )
    return lay_out(everyones[sources[0]])


def _share(
    arrays: Sequence[Array],
    fields: Sequence[Field],
    folder: Path,
    root: int | None,
    world: World,
) -> tuple[SharedFile, tuple[torch.Tensor, ...]]:
    """The node's file, filled, and what this rank sees of it. Collective."""
    nbytes = fields[-1].end
    writers = writers_of(world, root)
    writer = writers[world.node_rank]
    with contextlib.ExitStack() as undo:
        file, problem = None, None
        if world.rank == writer:
            remove_unused(folder)
            try:
                file = SharedFile.create(folder, nbytes)
                undo.callback(file.close)
            except OSError as error:
                problem = _no_space(nbytes, folder, error)
        raise_together(problem, world)
        path = Path(gather_json(str(file.path) if file else None, world=world)[writer])
        try:
            if file is None:
                file = SharedFile.join(path)
                undo.callback(file.close)
            # Each rank its part: memory near its cores, on machines with several sockets.
            part = split(nbytes, world.local_size)[world.local_rank]
            file.claim(part.start, part.stop - part.start)
        except OSError as error:
            problem = _no_space(nbytes, folder, error)
        raise_together(problem, world)
        assert file is not None
        _fill(file, arrays, fields, writers, root, world)
        views: tuple[torch.Tensor, ...] = ()
        try:
            views = views_of(path, fields)
        except OSError as error:
            problem = f"cannot map {path} ({reason_of(error)})"
        raise_together(problem, world)
        undo.pop_all()
    return file, views


def _no_space(nbytes: int, folder: Path, error: OSError) -> str:
    return (
        f"cannot share {format_bytes(nbytes)} in {folder} ({reason_of(error)}); free some, "
        "pass folder=... on a disk of the node, or start a container with a larger --shm-size"
    )


def _fill(
    file: SharedFile,
    arrays: Sequence[Array],
    fields: Sequence[Field],
    writers: Sequence[int],
    root: int | None,
    world: World,
) -> None:
    """Write all samples, a piece at a time. Collective."""
    nbytes = sum(field.nbytes for field in fields)
    with Relay(writers, root, world, nbytes, f"filling {file.path.parent}") as relay:
        for number, field in enumerate(fields):
            for rows in chunked(slice(0, field.shape[0]), max(1, PIECE_BYTES // field.row_bytes)):
                relay.pass_on(
                    (rows.stop - rows.start) * field.row_bytes,
                    partial(bytes_of, arrays[number], rows) if arrays else None,
                    partial(file.write, at=field.offset + rows.start * field.row_bytes),
                )
        relay.check()
