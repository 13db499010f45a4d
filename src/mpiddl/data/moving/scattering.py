"""Samples that one rank has, dealt out to all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy
import torch

from mpiddl.api.call import new_channel, run
from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import broadcast_json
from mpiddl.collectives.scatter import scatter as scatter_parts
from mpiddl.comm.world import World, current_world
from mpiddl.data.moving.node_stream import check_same_root
from mpiddl.data.moving.progress_bar import progress
from mpiddl.data.moving.rows import Kind, Rows, as_rows, kind_of_rows, room_for, take
from mpiddl.data.shards.kinds import Sharding
from mpiddl.data.shards.kinds import sharding as make_sharding
from mpiddl.data.shards.kinds.base import refuse_other_data
from mpiddl.data.shards.permutation import Indices
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["scatter"]

PIECE_BYTES = 64 << 20
"""For all ranks together: nothing is copied as a whole."""


@checks_world
def scatter(
    samples: Any,
    world: World | None = None,
    *,
    root: int = 0,
    sharding: str | Sharding = "contiguous",
    seed: int = 0,
    out: Any = None,
    **options: Any,
) -> Any:
    """Each rank's samples of those that rank ``root`` has. Collective.

    They travel in pieces, as bytes: of any size, and nothing is pickled.

    Args:
        samples: On ``root``: a numpy array or a tensor on the host whose first dimension counts
            samples, or a list of ``bytes``. Other ranks pass None.
        world: The ranks; default those of ``mpiddl.init()``.
        root: The rank that has them.
        sharding: Who gets which, as for ``mpiddl.data.sharding``; used on ``root`` alone.
        seed: Of the sharding.
        out: Where to put them: a contiguous array or tensor of the right kind and length; default
            a new one.
        options: What the sharding takes.

    Returns:
        An array, a tensor or a list, as ``root`` passed.

    Raises:
        ValueError: On every rank: ``root`` is no rank, or has no samples that can travel.
    """
    world = world or current_world()
    check_same_root(root, world)
    shards: list[Sequence[int] | Indices] = []
    told, problem = None, None
    if world.rank == root:
        try:
            told = "bytes" if isinstance(samples, list) else kind_of_rows(samples)
            if told == "bytes" and not all(isinstance(sample, bytes) for sample in samples):
                raise DataError("a list must hold bytes; pass numbers as an array")
            if isinstance(sharding, str):
                sharding = make_sharding(sharding, len(samples), seed=seed, **options)
            refuse_other_data(sharding, len(samples))
            shards = [sharding.shard(rank, world.size) for rank in range(world.size)]
        except (ValueError, TypeError) as error:
            problem = f"scatter: rank {root}: {error}"
    problem, told, lengths = broadcast_json(
        [problem, told, [len(shard) for shard in shards]], root, world=world
    )
    if problem is not None:
        raise DataError(problem, on_every_rank=True)
    if told == "bytes":
        return _scatter_bytes(samples, shards, lengths, root, world)
    problem = None
    try:
        room = room_for(lengths[world.rank], Kind(*told), out, samples)
    except DataError as error:
        problem = f"scatter: {error}"
    raise_together(problem, world)
    return _scatter_rows(samples, shards, lengths, room, root, world)


def _scatter_rows(
    samples: Any,
    shards: Sequence[Sequence[int] | Indices],
    lengths: Sequence[int],
    room: tuple[Any, Rows],
    root: int,
    world: World,
) -> Any:
    result, rows = room
    most = max(1, PIECE_BYTES // world.size // max(1, rows.shape[1]))  # samples of a rank at a time
    fill = take(samples) if world.rank == root else None
    whole = as_rows(samples) if world.rank == root else None
    rooms: dict[int, Rows] = {}

    def part(rank: int, start: int, stop: int) -> torch.Tensor:
        """What a rank gets next: in place where that is possible, else copied together."""
        indices = shards[rank][start:stop]
        if isinstance(indices, range) and indices.step == 1 and whole is not None:
            piece = whole[indices.start : indices.stop]
            if piece.flags.writeable:
                return torch.from_numpy(piece).view(-1)
        if rank not in rooms:
            rooms[rank] = numpy.empty((most, rows.shape[1]), dtype=numpy.uint8)
        copied = rooms[rank][: stop - start]
        assert fill is not None
        fill(numpy.asarray(indices, dtype=numpy.int64), copied)
        return torch.from_numpy(copied).view(-1)

    with progress(sum(lengths) * rows.shape[1], "scatter", world) as bar:
        for start in range(0, max(lengths), most):
            bounds = [(min(start, n), min(start + most, n)) for n in lengths]
            parts = [part(rank, *bounds[rank]) for rank in range(len(shards))]
            mine = torch.from_numpy(rows[slice(*bounds[world.rank])]).view(-1)
            run(world, scatter_parts(mine, parts, root, new_channel(world)))
            bar.advance(sum(stop - start for start, stop in bounds) * rows.shape[1])
    return result


def _scatter_bytes(
    samples: Any,
    shards: Sequence[Sequence[int] | Indices],
    lengths: Sequence[int],
    root: int,
    world: World,
) -> list[bytes]:
    """Their lengths first, then all of a rank's in a row."""
    order = [samples[index] for shard in shards for index in shard]
    stops = [0, *accumulate(lengths)]
    sizes = numpy.array([len(sample) for sample in order], dtype=numpy.int64)
    own = [range(*pair) for pair in pairwise(stops)] if world.rank == root else []
    room = room_for(lengths[world.rank], Kind("numpy", "<i8", []))
    mine = _scatter_rows(sizes, own, lengths, room, root, world)
    flat, nbytes = None, None
    if world.rank == root:
        flat = numpy.frombuffer(bytearray(b"".join(order)), dtype=numpy.uint8)
        ends = [0, *numpy.cumsum(sizes).tolist()]
        own = [range(ends[start], ends[stop]) for start, stop in pairwise(stops)]
        nbytes = [len(part) for part in own]
    nbytes = broadcast_json(nbytes, root, world=world)
    room = room_for(nbytes[world.rank], Kind("numpy", "|u1", []))
    raw = _scatter_rows(flat, own, nbytes, room, root, world).tobytes()
    return [raw[start:stop] for start, stop in pairwise([0, *accumulate(mine.tolist())])]
