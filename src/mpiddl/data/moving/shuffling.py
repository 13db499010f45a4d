"""Samples that only fit spread out over the ranks, in a new global order."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy
import torch

from mpiddl.api.call import new_channel, start
from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import gather_json
from mpiddl.collectives.all_to_all import all_to_all
from mpiddl.comm.world import World, current_world
from mpiddl.data.agreement import refuse_different
from mpiddl.data.moving.progress_bar import progress
from mpiddl.data.moving.rows import Rows, kind_of_rows, room_for, take
from mpiddl.data.shards.permutation import Indices, Permutation
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["check_arrays", "shuffle"]

PIECE_BYTES = 4 << 20
"""That a rank receives at a time: nothing is copied as a whole, and pieces stay in the cache."""
PIECE_BYTES_BETWEEN_NODES = 16 << 20
IN_FLIGHT_BETWEEN_NODES = 4
"""Pieces: so many bytes keep a link busy both ways, whose queues hold up each handshake."""


@checks_world
def shuffle(
    *arrays: Any,
    world: World | None = None,
    seed: int = 0,
    epoch: int = 0,
    out: Any = None,
) -> tuple[Any, ...]:
    """As many samples as this rank has, drawn from those of all ranks. Collective.

    All ranks' samples are one long row, rank 0's first; they come back in a random order, another
    one for each ``seed`` and ``epoch``, each of them exactly once, and each rank has as many as it
    had. Nobody holds more than twice its own.

    Args:
        arrays: numpy arrays or tensors on the host, of one length on a rank, and one dtype and
            shape of a sample on all ranks: inputs and labels, say. They are left as they are.
        world: The ranks; default those of ``mpiddl.init()``.
        seed: Of the order; the same on every rank.
        epoch: Likewise.
        out: Where to put them: contiguous arrays of the same kinds and lengths, one for each, to be
            used again every epoch; default new ones.

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
        between_nodes = world.num_nodes > 1
        self._piece_bytes = PIECE_BYTES_BETWEEN_NODES if between_nodes else PIECE_BYTES
        self._in_flight = IN_FLIGHT_BETWEEN_NODES if between_nodes else 1
        self._stops = numpy.cumsum(lengths)
        self._starts = self._stops - lengths
        self._first = int(self._starts[world.rank])
        self._order = Permutation(self.total, key)
        mine = self._first + numpy.arange(lengths[world.rank])
        targets = self._order.at(mine)
        self._local = numpy.argsort(targets)  # this rank's samples, by where they go
        self._targets = targets[self._local]

    def move(self, array: Any, result: Rows, bar: Any) -> None:
        """Fill ``result``, a piece of it after the other, on all ranks at a time.

        Between nodes several travel at a time; meanwhile the next is gathered, the first placed.
        """
        width = result.shape[1]
        piece = max(1, self._piece_bytes // max(1, width))
        gather = take(array)
        rooms = [numpy.empty((2, 0, width), dtype=numpy.uint8)] * self._in_flight
        flying: deque[Callable[[], None]] = deque()

        def land(work: Any, arrived: Rows, places: Indices, out: Rows, nbytes: int) -> None:
            work.wait()
            numpy.take(arrived, places, axis=0, out=out, mode="clip")
            bar.advance(nbytes)

        for number, begin in enumerate(range(0, int((self._stops - self._starts).max()), piece)):
            if len(flying) == self._in_flight:
                flying.popleft()()
            firsts = numpy.minimum(self._starts + begin, self._stops)
            lasts = numpy.minimum(firsts + piece, self._stops)
            leaving = self._leaving(firsts, lasts)
            places, received = self._arriving(firsts, lasts)
            room = max(sum(map(len, leaving)), len(places))
            at = number % self._in_flight
            rooms[at] = _at_least(room, rooms[at])
            arrived, departing = rooms[at][0, : len(places)], rooms[at][1]
            incoming = _parts(arrived, received)
            outgoing = _parts(departing, [len(rows) for rows in leaving])
            outgoing[self._world.rank] = incoming[self._world.rank]  # which are in place at once
            for rows, part in zip(leaving, outgoing, strict=True):
                gather(rows, part)
            channel = new_channel(self._world)
            waits = all_to_all([*map(_flat, incoming)], [*map(_flat, outgoing)], channel)
            first = int(firsts[self._world.rank]) - self._first
            out = result[first : first + len(places)]
            work = start(waits, self._world, out, async_=True)
            nbytes = int((lasts - firsts).sum()) * width
            flying.append(functools.partial(land, work, arrived, places, out, nbytes))
        while flying:
            flying.popleft()()

    def _leaving(self, firsts: Indices, lasts: Indices) -> list[Indices]:
        """This rank's samples that go to these places of each rank."""
        begins = numpy.searchsorted(self._targets, firsts)
        ends = numpy.searchsorted(self._targets, lasts)
        pairs = zip(begins.tolist(), ends.tolist(), strict=True)
        return [self._local[begin:end] for begin, end in pairs]

    def _arriving(self, firsts: Indices, lasts: Indices) -> tuple[Indices, list[int]]:
        """For each of this rank's places the row in which it arrives, and rows from each rank.

        Rows arrive rank after rank, and those of a rank by their place.
        """
        here = self._world.rank
        sources = self._order.places_of(numpy.arange(firsts[here], lasts[here]))
        ranks = numpy.searchsorted(self._stops, sources, side="right")
        rows = numpy.empty_like(sources)
        rows[numpy.argsort(ranks, kind="stable")] = numpy.arange(len(sources))
        return rows, numpy.bincount(ranks, minlength=len(self._stops)).tolist()


def _at_least(length: int, room: Rows) -> Rows:
    """The same room, or a larger one: both halves of it."""
    if length <= room.shape[1]:
        return room
    return numpy.empty((2, length + length // 8, room.shape[2]), dtype=numpy.uint8)


def _parts(rows: Rows, lengths: Iterable[int]) -> list[Rows]:
    """One after the other."""
    return [rows[start:stop] for start, stop in pairwise([0, *accumulate(lengths)])]


def _flat(rows: Rows) -> torch.Tensor:
    return torch.from_numpy(rows).view(-1)
