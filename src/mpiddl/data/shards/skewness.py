"""How far the classes on each rank are from those of the whole data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World, current_world
from mpiddl.data.shards.labels import codes_of
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["Skew", "skew", "skew_of"]

MOST_COLUMNS = 10
"""Classes that a table can show, a column each."""
MOST_ROWS = 20
"""Ranks that a table shows; with more those that are furthest off."""


@dataclass(frozen=True, eq=False)
class Skew:
    """The classes that each rank has; ``print`` shows a table.

    Attributes:
        classes: All labels that occur, sorted.
        counts: Samples of each class on each rank, int64. Shape: (ranks, classes).
    """

    classes: tuple[Any, ...]
    counts: NDArray[numpy.int64]

    @property
    def samples(self) -> NDArray[numpy.int64]:
        """Samples of each rank."""
        return numpy.asarray(self.counts.sum(axis=1))

    @property
    def shares(self) -> NDArray[numpy.float64]:
        """Each class's part of each rank's samples; 0 on a rank without. Shape: as ``counts``."""
        return numpy.asarray(self.counts / numpy.maximum(self.samples, 1)[:, None])

    @property
    def distances(self) -> NDArray[numpy.float64]:
        """Between each rank's classes and the data set's, from 0 (the same mix) towards 1.

        The total-variation distance: the part of the rank's samples that would have to be of
        another class. 0 for a rank without samples.
        """
        overall = self.counts.sum(axis=0) / self.counts.sum()
        distances = abs(self.shares - overall).sum(axis=1) / 2
        return numpy.where(self.samples > 0, distances, 0.0)

    @property
    def worst(self) -> tuple[int, float]:
        """The rank that is furthest off, and its distance."""
        rank = int(self.distances.argmax())
        return rank, float(self.distances[rank])

    def __str__(self) -> str:
        ranks = range(len(self.counts))
        shown = sorted(sorted(ranks, key=lambda rank: -self.distances[rank])[:MOST_ROWS])
        few = len(self.classes) <= MOST_COLUMNS
        headings = map(str, self.classes) if few else ("classes", "most frequent")
        rows = [["rank", "samples", "distance", *headings]]
        for rank in shown:
            distance = f"{self.distances[rank]:.3f}"
            rows.append([str(rank), *self._cells(self.counts[rank], distance, few)])
        rows.append(["all", *self._cells(self.counts.sum(axis=0), "", few)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        if len(shown) < len(ranks):
            nearest = max(self.distances[rank] for rank in ranks if rank not in shown)
            lines.append(f"{len(ranks) - len(shown)} more ranks, at most {nearest:.3f} off")
        worst, most = self.worst
        lines.append(f"furthest from the data set's mix of classes: rank {worst}, {most:.3f}")
        return "\n".join(lines)

    def _cells(self, counts: NDArray[numpy.int64], distance: str, few: bool) -> list[str]:
        """Of a line of the table: each class's share, or how many there are and the first."""
        samples = int(counts.sum())
        shares = [f"{count / samples:.1%}" if samples else "-" for count in counts.tolist()]
        if not few:
            first = int(counts.argmax())
            most = f"{self.classes[first]}: {shares[first]}" if samples else "-"
            shares = [str(numpy.count_nonzero(counts)), most]
        return [f"{samples:,}", distance, *shares]

    def plot(self, path: str | Path) -> None:
        """Draw samples and classes of each rank; PNG, PDF or SVG.

        Raises:
            ImportError: matplotlib is missing: pip install 'mpiddl[plots]'.
        """
        from mpiddl.data.shards.plots import plot_report

        plot_report(path, self)


@checks_world
def skew(labels: Sequence[Any] | NDArray[Any], world: World | None = None) -> Skew:
    """Compare what classes the ranks have. Collective; the same result on every rank.

    Args:
        labels: Of this rank's samples: integers or strings.
        world: The ranks; default those of ``mpiddl.init()``.

    Raises:
        DataError: On every rank: labels are neither integers nor strings, of different kinds on
            different ranks, or there are none at all.
    """
    world = world or current_world()
    problem = None
    try:
        codes, found = codes_of(labels)
        classes = (found if found.dtype.kind != "S" else found.astype(str)).tolist()
        mine = [classes, numpy.bincount(codes).tolist()]
    except (ValueError, TypeError) as error:
        problem = str(error)
    raise_together(problem, world)
    everyones = gather_json(mine, world=world)
    kinds = {type(classes[0]).__name__ for classes, _ in everyones if classes}
    if len(kinds) != 1:
        raise DataError(
            f"labels are of several kinds on different ranks: {', '.join(sorted(kinds))}"
            if kinds
            else "no rank has any labels",
            on_every_rank=True,
        )
    every_class = tuple(sorted({name for classes, _ in everyones for name in classes}))
    columns = {name: column for column, name in enumerate(every_class)}
    counts = numpy.zeros((world.size, len(columns)), dtype=numpy.int64)
    for row, (classes, numbers) in zip(counts, everyones, strict=True):
        row[[columns[name] for name in classes]] = numbers
    return Skew(every_class, counts)


def skew_of(labels: Sequence[Any] | NDArray[Any], shards: Sequence[Any]) -> Skew:
    """The same from the labels of all samples and the indices of each rank. No communication.

    Args:
        labels: Of the whole data set: integers or strings.
        shards: The samples of rank 0, of rank 1, ...: arrays, lists or ranges of indices.

    Raises:
        DataError: Labels do not fit, there are no samples or no shards, or an index has no label.
    """
    codes, found = codes_of(labels)
    if not len(shards) or not sum(map(len, shards)):
        raise DataError("no rank has any samples")
    counts = numpy.empty((len(shards), len(found)), dtype=numpy.int64)
    for rank, shard in enumerate(shards):
        indices = numpy.asarray(shard, dtype=numpy.int64)
        outside = indices[(indices < 0) | (indices >= len(codes))]
        if len(outside):
            raise DataError(f"rank {rank}: sample {outside[0]} has none of {len(codes)} labels")
        counts[rank] = numpy.bincount(codes[indices], minlength=len(found))
    return Skew(tuple(found.tolist()), counts)
