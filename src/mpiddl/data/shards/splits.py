"""Training, validation and test set: disjoint, together everything, the same on every rank."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Sized
from fractions import Fraction
from itertools import product
from math import lcm
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.labels import codes_of
from mpiddl.data.shards.permutation import Indices
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["split"]


@checks_world
def split(
    dataset: Sized | int,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    *,
    labels: Sequence[Any] | NDArray[Any] | None = None,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    seed: int = 0,
) -> tuple[Indices, ...]:
    """Deal the samples out to parts, at random. No communication: every rank finds the same.

    Sizes of the parts are their fractions of the samples, rounded up or down. With ``labels`` so
    are, at the same time, the samples of each class in each part. With ``groups`` the samples of
    a group (a patient, a user) stay together, and sizes are as near as a simple rule brings them:
    the largest group first, to the part that lacks most.

    Args:
        dataset: A data set, or its length.
        fractions: Of each part; positive, adding up to 1.
        labels: One for each sample: integers or strings.
        groups: One for each sample: integers or strings. Not together with ``labels``.
        seed: Of the choice; the same on every rank.

    Returns:
        Sorted indices, int64, for each part. ``torch.utils.data.Subset(dataset, indices)`` makes
        a data set of them.

    Raises:
        DataError: Fractions do not add up to 1, labels or groups do not fit, or a part would be
            empty.

    Source:
        Bacharach, Management Science 12(9), 1966: a table can be rounded so that its cells, rows
        and columns are all rounded up or down.
    """
    length = len(dataset) if isinstance(dataset, Sized) else operator.index(dataset)
    weights = _weights_of(fractions)
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")
    if labels is not None and groups is not None:
        raise DataError("labels and groups cannot both be kept: pass one of them")
    if length < 1:
        raise DataError("the data set is empty")
    random = numpy.random.default_rng(seed)
    if groups is not None:
        codes, names = codes_of(groups, length, "groups")
        if len(names) < len(weights):
            raise DataError(f"{len(names)} groups for {len(weights)} parts: ask for fewer parts")
        owners = _deal_groups(numpy.bincount(codes), weights, random)[codes]
    else:
        codes = numpy.zeros(length, dtype=numpy.int64)
        if labels is not None:
            codes, _ = codes_of(labels, length)
        owners = _deal_samples(codes, weights, random)
    parts = tuple(numpy.flatnonzero(owners == part) for part in range(len(weights)))
    if not all(map(len, parts)):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise DataError(
            f"{length} samples are too few for fractions {tuple(fractions)}: parts would have "
            f"{sizes}; ask for fewer parts or larger fractions"
        )
    return parts


def _weights_of(fractions: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of ``fractions``: what is rounded must not depend on 0.1's
    last bit."""
    try:
        exact = [Fraction(float(part)).limit_denominator(10**9) for part in fractions]
    except (TypeError, ValueError, OverflowError):  # no numbers, or not finite
        exact = []
    if not exact or min(exact) <= 0 or abs(float(sum(exact)) - 1) > 1e-6:
        raise DataError(f"fractions must be positive and add up to 1, got {fractions}")
    whole = lcm(*(part.denominator for part in exact))
    return [int(part * whole) for part in exact]


def _deal_samples(codes: Indices, weights: list[int], random: numpy.random.Generator) -> Indices:
    """The part of each sample; which samples of a class, is chance."""
    table = _rounded(numpy.bincount(codes).tolist(), weights)
    order = random.permutation(len(codes))
    by_class = order[numpy.argsort(codes[order], kind="stable")]
    owners = numpy.empty(len(codes), dtype=numpy.int64)
    owners[by_class] = numpy.repeat(
        numpy.tile(numpy.arange(len(weights)), len(table)), table.ravel()
    )
    return owners


def _rounded(counts: list[int], weights: list[int]) -> Indices:
    """Samples of each class in each part. Shape: (classes, parts).

    Cells and sums of columns are their real values rounded up or down, and rows sum up to
    ``counts``.
    """
    whole = sum(weights)
    table = numpy.array([[count * weight // whole for weight in weights] for count in counts])
    table = table.reshape(len(counts), len(weights)).astype(numpy.int64)
    broken = numpy.array([[count * weight % whole > 0 for weight in weights] for count in counts])
    raised = numpy.zeros(table.shape, dtype=bool)
    # By how much each part is too small so far, in units of 1/whole.
    lacks = [0] * len(weights)
    for row, count in enumerate(counts):
        rests = [count * weight % whole for weight in weights]
        lacks = [lack + rest for lack, rest in zip(lacks, rests, strict=True)]
        open_to_more = [part for part, rest in enumerate(rests) if rest]
        open_to_more.sort(key=lambda part: -lacks[part])
        for part in open_to_more[: sum(rests) // whole]:
            raised[row, part] = True
            lacks[part] -= whole
    # Each class by itself is right now. Parts become so where a sample can go, class by class,
    # from a part that is too large to one that is too small: while that brings sizes nearer to
    # their real values there is such a way, and at the end none is off by 1 or more.
    while way := _way(lacks, raised, broken, whole):
        for giver, taker in way:
            row = int(numpy.flatnonzero(raised[:, giver] & (broken & ~raised)[:, taker])[0])
            raised[row, [giver, taker]] = False, True
            lacks[giver] += whole
            lacks[taker] -= whole
    return table + raised


def _way(
    lacks: list[int], raised: NDArray[numpy.bool_], broken: NDArray[numpy.bool_], whole: int
) -> list[tuple[int, int]]:
    """Steps from part to part along which one sample makes sizes better; none, if there is no
    such way."""
    parts = range(len(lacks))
    steps = raised.T.astype(numpy.int64) @ (broken & ~raised) > 0
    pairs = sorted(product(parts, parts), key=lambda pair: lacks[pair[0]] - lacks[pair[1]])
    for start, end in pairs:
        if lacks[end] - lacks[start] <= whole:
            break
        came_from = {start: start}
        reached = [start]
        for part in reached:
            for after in numpy.flatnonzero(steps[part]).tolist():
                if after not in came_from:
                    came_from[after] = part
                    reached.append(after)
        if end in came_from:
            way = []
            while end != start:
                way.append((came_from[end], end))
                end = came_from[end]
            return way[::-1]
    return []


def _deal_groups(
    lengths: NDArray[Any], weights: list[int], random: numpy.random.Generator
) -> Indices:
    """The part of each group."""
    whole, total = sum(weights), int(lengths.sum())
    lacks = [total * weight for weight in weights]
    empty = set(range(len(weights)))
    order = random.permutation(len(lengths))
    order = order[numpy.argsort(-lengths[order], kind="stable")]
    owners = numpy.empty(len(lengths), dtype=numpy.int64)
    for left, group in zip(range(len(order), 0, -1), order.tolist(), strict=True):
        choice = empty if left == len(empty) else range(len(weights))
        part = max(choice, key=lambda part: (lacks[part], -part))
        owners[group] = part
        lacks[part] -= int(lengths[group]) * whole
        empty.discard(part)
    return owners
