"""Samples that only fit spread out over the ranks, in a new global order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from mpiddl.collectives.all_to_all import all_to_all
from mpiddl.comm.world import World, current_world
from mpiddl.data.agreement import refuse_different
from mpiddl.data.permutation import Indices, Permutation
from mpiddl.data.progress_bar import progress
from mpiddl.data.rows import Rows, kind_of_rows, room_for, take
from mpiddl.data.together import raise_together
from mpiddl.errors import DataError
from mpiddl.overlap.arguments import new_channel, run
from mpiddl.overlap.calls import gather_json

__all__ = ["check_arrays", "shuffle"]

PIECE_BYTES = 4 << 20
"""That a rank receives at a time: nothing is copied as a whole, and pieces stay in the cache."""


def shuffle(
    *arrays: Any,
    seed: int = 0,
    epoch: int = 0,
    out: Any = None,
    world: World | None = None,
) -> tuple[Any, ...]:
    """As many samples as this rank has, drawn from those of all ranks. Collective.

    All ranks' samples are one long row, rank 0's first; they come back in a random order, another
    one for each ``seed`` and ``epoch``, each of them exactly once, and each rank has as many as it
    had. Nobody holds more than twice its own.

    Args:
        arrays: numpy arrays or tensors on the host, of one length on a rank, and one dtype and
            shape of a sample on all ranks: inputs and labels, say. They are left as they are.
        seed: Of the order; the same on every rank.
        epoch: Likewise.
        out: Where to put them: contiguous arrays of the same kinds and lengths, one for each, to be
            used again every epoch; default new ones.
        world: The ranks; default those of ``mpiddl.init()``.

    Returns:
        As many arrays and tensors.

    Raises:
        ValueError: On every rank: arrays that do not fit together.
    """
    world = world or current_world()
    results = check_arrays(arrays, [seed, epoch], world, out)
    exchange = _Exchange(gather_json(len(arrays[0]), world=world), [seed, epoch], world)
    nbytes = sum(exchange.total * rows.shape[1] for _, rows in results)
    with progress(nbytes, "shuffle", world) as bar:
        for array, (_, rows) in zip(arrays, results, strict=True):
            exchange.move(array, rows, bar)
    return tuple(result for result, _ in results)


def check_arrays(
    arrays: Sequence[Any], key: Sequence[int], world: World, out: Any = None
) -> list[tuple[Any, Rows]]:
    """Where results go, as they are and as rows. Collective.

    Raises:
        DataError: On every rank, if arrays do not fit together, or not to those of other ranks.
    """
    problem, kinds, results = None, [], []
    try:
        kinds = [kind_of_rows(array) for array in arrays]
        if not arrays or len({len(array) for array in arrays}) > 1:
            raise DataError("pass one or more arrays of one length")
        none = [None] * len(arrays)
        given = none if out is None else list(out) if isinstance(out, list | tuple) else [out]
        if len(given) != len(arrays):
            raise DataError("out must be one array for each that is shuffled")
        for kind, own, array in zip(kinds, given, arrays, strict=True):
            results.append(room_for(len(arrays[0]), kind, own, array))
    except DataError as error:
        problem = f"shuffle: {error}"
    raise_together(problem, world)
    facts = {
        "the samples": [list(kind) for kind in kinds],
        **dict(zip(("seed", "epoch"), key, strict=False)),
    }
    refuse_different("shuffle", facts, world)
    return results


class _Exchange:
    """Who sends what to whom: every rank computes it, nobody tells.

    Args:
        lengths: Samples of each rank.
        key: Of the order.
        world: The ranks.
    """

    def __init__(self, lengths: Sequence[int], key: Sequence[int], world: World) -> None:
        self.total = sum(lengths)
        self._world = world
        self._stops = numpy.cumsum(lengths)
        self._starts = self._stops - lengths
        self._order = Permutation(self.total, key)
        mine = self._starts[world.rank] + numpy.arange(lengths[world.rank])
        targets = self._order.at(mine)
        self._local = numpy.argsort(targets)  # this rank's samples, by where they go
        self._targets = targets[self._local]

    def move(self, array: Any, result: Rows, bar: Any) -> None:
        """Fill ``result``, a piece of it after the other, on all ranks at a time."""
        width = result.shape[1]
        piece = max(1, PIECE_BYTES // max(1, width))
        gather = take(array)
        rooms = numpy.empty((2, 0, width), dtype=numpy.uint8)
        for start in range(0, int((self._stops - self._starts).max()), piece):
            firsts = numpy.minimum(self._starts + start, self._stops)
            lasts = numpy.minimum(firsts + piece, self._stops)
            leaving, sent = self._leaving(firsts, lasts)
            places, received = self._arriving(firsts, lasts)
            room = max(len(leaving), len(places))
            if room > rooms.shape[1]:
                rooms = numpy.empty((2, room + room // 8, width), dtype=numpy.uint8)
            outgoing, incoming = rooms[0, : len(leaving)], rooms[1, : len(places)]
            gather(leaving, outgoing)
            channel = new_channel(self._world)
            run(
                self._world,
                all_to_all(_parts(incoming, received), _parts(outgoing, sent), channel),
            )
            here = self._starts[self._world.rank]
            first, last = firsts[self._world.rank] - here, lasts[self._world.rank] - here
            numpy.take(incoming, places, axis=0, out=result[first:last], mode="clip")
            bar.advance(int((lasts - firsts).sum()) * width)

    def _leaving(self, firsts: Indices, lasts: Indices) -> tuple[Indices, Indices]:
        """This rank's samples that go to these places of each rank, and how many they are."""
        begins = numpy.searchsorted(self._targets, firsts)
        ends = numpy.searchsorted(self._targets, lasts)
        pairs = zip(begins.tolist(), ends.tolist(), strict=True)
        return numpy.concatenate([self._local[begin:end] for begin, end in pairs]), ends - begins

    def _arriving(self, firsts: Indices, lasts: Indices) -> tuple[Indices, Indices]:
        """For each of this rank's places the row in which it arrives, and rows from each rank.

        Rows arrive rank after rank, and those of a rank by their place.
        """
        here = self._world.rank
        sources = self._order.places_of(numpy.arange(firsts[here], lasts[here]))
        ranks = numpy.searchsorted(self._stops, sources, side="right")
        rows = numpy.empty_like(sources)
        rows[numpy.argsort(ranks, kind="stable")] = numpy.arange(len(sources))
        return rows, numpy.bincount(ranks, minlength=len(self._stops))


def _parts(rows: Rows, lengths: NDArray[Any]) -> list[torch.Tensor]:
    """One after the other, as bytes."""
    stops = numpy.cumsum(lengths)
    return [
        torch.from_numpy(rows[stop - length : stop]).view(-1)
        for stop, length in zip(stops.tolist(), lengths.tolist(), strict=True)
    ]
