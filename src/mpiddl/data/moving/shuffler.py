"""A new global order every epoch, of samples that are spread out over the ranks."""

from __future__ import annotations

from typing import Any

import numpy

from mpiddl.api.barrier import barrier
from mpiddl.api.objects import gather_json
from mpiddl.comm.windows import Window
from mpiddl.comm.world import World, current_world
from mpiddl.data.agreement import refuse_different
from mpiddl.data.moving.rows import Rows, kind_of_rows, room_for, take
from mpiddl.data.moving.shuffling import check_arrays, shuffle
from mpiddl.data.shards.permutation import Permutation
from mpiddl.data.signatures import checks_world

__all__ = ["Shuffler"]

PIECE = 1 << 14
"""Samples whose places are computed at a time."""


class Shuffler:
    """Each rank keeps as many samples as it brought; which ones, changes every epoch.

        samples = mpiddl.data.Shuffler(inputs, labels, seed=0)
        for epoch in range(epochs):
            inputs, labels = samples.epoch(epoch)

    Where all ranks share a node the samples are put into memory that they share, once, and each
    rank gathers its own from there: one pass, and no message. Across nodes every epoch is a
    ``shuffle``. Both give the same samples. Held are the samples as they came, and those of the
    epoch.

    Collective, like ``shuffle``.

    Args:
        arrays: As for ``shuffle``.
        world: The ranks; default those of ``mpiddl.init()``.
        seed: Likewise.

    Raises:
        ValueError: As ``shuffle``.
    """

    @checks_world
    def __init__(self, *arrays: Any, world: World | None = None, seed: int = 0) -> None:
        self._world = world or current_world()
        self._seed = seed
        check_arrays(arrays, [seed], self._world)
        self._lengths: list[int] = gather_json(len(arrays[0]), world=self._world)
        self._arrays = arrays
        kinds = [kind_of_rows(array) for array in arrays]
        self._room = [room_for(len(arrays[0]), kind) for kind in kinds]
        self._windows: list[Window] = []
        self._together = self._share(arrays)

    def _share(self, arrays: tuple[Any, ...]) -> list[Rows]:
        """All ranks' samples in shared memory; nothing where that cannot be. Collective."""
        if self._world.num_nodes > 1:
            return []
        total, first = sum(self._lengths), sum(self._lengths[: self._world.rank])
        together = []
        for array, (_, room) in zip(arrays, self._room, strict=True):
            nbytes = total * room.shape[1]
            window = self._world.windows.allocate(-(-nbytes // self._world.size))
            if window is None:
                self._windows.clear()
                return []
            self._windows.append(window)
            memory = numpy.frombuffer(window.memory, dtype=numpy.uint8)[:nbytes]
            rows = memory.reshape(total, room.shape[1])
            take(array)(numpy.arange(len(array)), rows[first : first + len(array)])
            together.append(rows)
        self._arrays = ()  # the caller's, which are not needed any more
        barrier(world=self._world)
        return together

    def epoch(self, number: int) -> tuple[Any, ...]:
        """This rank's samples of an epoch, in memory that the next call uses again.

        Raises:
            ValueError: On every rank: ranks ask for different epochs.
        """
        results = tuple(result for result, _ in self._room)
        if not self._together:
            world = self._world
            return shuffle(*self._arrays, seed=self._seed, epoch=number, out=results, world=world)
        refuse_different("Shuffler", {"epoch": number}, self._world)
        order = Permutation(sum(self._lengths), [self._seed, number])
        first = sum(self._lengths[: self._world.rank])
        for start in range(0, self._lengths[self._world.rank], PIECE):
            stop = min(start + PIECE, self._lengths[self._world.rank])
            sources = order.places_of(numpy.arange(first + start, first + stop))
            for rows, (_, room) in zip(self._together, self._room, strict=True):
                numpy.take(rows, sources, axis=0, out=room[start:stop], mode="clip")
        return results
