"""Training, validation and test set: disjoint, everything, and rounded as little as can be."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from math import ceil, floor

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiddl.data.shards.splits import split
from mpiddl.errors import DataError

quietly = settings(deadline=None)
FRACTIONS = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(
    lambda weights: tuple(weight / sum(weights) for weight in weights)
)


def exact(fractions):
    """As written on paper: a third is 1/3."""
    parts = [Fraction(part).limit_denominator(1000) for part in fractions]
    assert sum(parts) == 1
    return parts


def tried(*args, **options):
    """The parts, or None where there are too few samples."""
    try:
        return split(*args, **options)
    except DataError as error:
        if "too few" in str(error) or "groups for" in str(error):
            return None
        raise


def check_cover(parts, length):
    assert all(part.dtype == numpy.int64 and (numpy.diff(part) > 0).all() for part in parts)
    assert sorted(numpy.concatenate(parts).tolist()) == list(range(length))


def largest_remainder(length, fractions):
    """The textbook's rule, for comparison."""
    wanted = [length * part for part in exact(fractions)]
    sizes = [floor(size) for size in wanted]
    by_rest = sorted(range(len(sizes)), key=lambda part: sizes[part] - wanted[part])
    for part in by_rest[: length - sum(sizes)]:
        sizes[part] += 1
    return sizes


@quietly
@given(length=st.integers(1, 200), fractions=FRACTIONS, seed=st.integers(0, 3))
def test_sizes_are_the_fractions_rounded(length, fractions, seed):
    sizes = largest_remainder(length, fractions)
    parts = tried(length, fractions, seed=seed)
    assert (parts is None) == (0 in sizes)
    if parts is not None:
        check_cover(parts, length)
        assert [len(part) for part in parts] == sizes


def is_rounded(value, real):
    return value in (floor(real), ceil(real))


@quietly
@given(
    labels=st.lists(st.integers(-3, 6), min_size=1, max_size=150),
    fractions=FRACTIONS,
    seed=st.integers(0, 3),
)
def test_every_class_and_every_size_is_rounded_up_or_down(labels, fractions, seed):
    parts = tried(len(labels), fractions, labels=labels, seed=seed)
    shares = exact(fractions)
    if parts is None:
        assert any(len(labels) * share < 1 for share in shares)
        return
    check_cover(parts, len(labels))
    for share, part in zip(shares, parts, strict=True):
        assert is_rounded(len(part), len(labels) * share)
        chosen = [labels[index] for index in part]
        for label in set(labels):
            assert is_rounded(chosen.count(label), labels.count(label) * share), label


def nearest_sizes(counts, fractions):
    """How near sizes can be to their real values: every way to round the table is tried."""
    shares = exact(fractions)
    reached = {(0,) * len(shares)}
    for count in counts:
        real = [count * share for share in shares]
        broken = [part for part, value in enumerate(real) if value != floor(value)]
        more = count - sum(map(floor, real))
        rows = [
            [floor(value) + (part in chosen) for part, value in enumerate(real)]
            for chosen in combinations(broken, more)
        ]
        reached = {
            tuple(map(sum, zip(sizes, row, strict=True))) for sizes, row in product(reached, rows)
        }
    return min(distance(sizes, counts, shares) for sizes in reached)


def distance(sizes, counts, shares):
    wanted = [sum(counts) * share for share in shares]
    return sum((size - real) ** 2 for size, real in zip(sizes, wanted, strict=True))


@quietly
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=4), fractions=FRACTIONS)
def test_no_other_rounding_brings_sizes_nearer(counts, fractions):
    labels = numpy.repeat(numpy.arange(len(counts)), counts)
    parts = tried(len(labels), fractions, labels=labels)
    if parts is not None:
        sizes = [len(part) for part in parts]
        assert distance(sizes, counts, exact(fractions)) == nearest_sizes(counts, fractions)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((4, 4, 7, 5), (5, 7, 10)),
        ((11, 2, 9), (11, 12, 10, 6)),
        ((10, 4, 10, 6), (8, 10)),
    ],
)
def test_a_sample_too_many_may_have_to_move_in_two_steps(weights, counts):
    fractions = [weight / sum(weights) for weight in weights]
    parts = split(sum(counts), fractions, labels=numpy.repeat(range(len(counts)), counts))
    sizes = [len(part) for part in parts]
    assert distance(sizes, counts, exact(fractions)) == nearest_sizes(counts, fractions)


@quietly
@given(
    groups=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60),
    fractions=FRACTIONS,
    seed=st.integers(0, 2),
)
def test_groups_stay_together(groups, fractions, seed):
    parts = tried(len(groups), fractions, groups=groups, seed=seed)
    assert (parts is None) == (len(set(groups)) < len(fractions))
    if parts is not None:
        check_cover(parts, len(groups))
        assert all(map(len, parts))
        held = [{groups[index] for index in part} for part in parts]
        assert sum(map(len, held)) == len(set(groups))


def test_many_small_groups_are_split_as_finely_as_samples():
    groups = [index // 2 for index in range(200)]
    sizes = [len(part) for part in split(200, (0.7, 0.2, 0.1), groups=groups)]
    assert sizes == [140, 40, 20]


def test_a_large_group_goes_where_most_is_missing():
    groups = ["small", "large", "large", "large", "large", "large", "tiny"]
    first, second = split(7, (0.3, 0.7), groups=groups)
    assert second.tolist() == [1, 2, 3, 4, 5]
    assert first.tolist() == [0, 6]


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": [0, 1, 1, 2] * 25}, {"groups": [index // 3 for index in range(100)]}],
    ids=["plain", "labels", "groups"],
)
def test_the_seed_decides(options):
    def found(seed):
        return tuple(tuple(part.tolist()) for part in split(100, seed=seed, **options))

    assert found(3) == found(3)
    assert len({found(seed) for seed in range(5)}) == 5


def test_chance_is_fair():
    """Every sample is as likely in each part."""
    seen = numpy.zeros(10)
    for seed in range(400):
        seen[split(10, (0.8, 0.2), seed=seed)[1]] += 1
    assert seen.sum() == 800
    assert (abs(seen - 80) < 6 * 8).all()


def test_what_labels_may_be():
    words = ["b", "a", "b", "a"] * 5
    numbers = [1, 0, 1, 0] * 5
    expected = [part.tolist() for part in split(20, (0.5, 0.5), labels=words)]
    for labels in (numbers, numpy.array(numbers), torch.tensor(numbers), numpy.array(words)):
        assert [part.tolist() for part in split(20, (0.5, 0.5), labels=labels)] == expected


def test_a_data_set_instead_of_its_length():
    samples = torch.utils.data.TensorDataset(torch.arange(20))
    parts = split(samples, (0.75, 0.25))
    assert [part.tolist() for part in parts] == [p.tolist() for p in split(20, (0.75, 0.25))]
    assert len(torch.utils.data.Subset(samples, parts[1])) == 5


def test_many_classes_are_quick():
    labels = numpy.arange(60_000) // 3
    parts = split(60_000, (0.8, 0.1, 0.1), labels=labels)
    assert [len(part) for part in parts] == [48_000, 6_000, 6_000]
    assert numpy.bincount(labels[parts[0]], minlength=20_000).min() == 2


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ((10, (0.5, 0.4)), {}, r"add up to 1, got \(0.5, 0.4\)"),
        ((10, (1.5, -0.5)), {}, "positive"),
        ((10, (1.0, 0.0)), {}, "positive"),
        ((10, ()), {}, "positive"),
        ((10, (float("nan"), 1.0)), {}, "positive"),
        ((10, (float("inf"), 1.0)), {}, "positive"),
        ((10, 0.5), {}, "positive"),
        ((10, ("a", "b")), {}, "positive"),
        ((3, (0.9, 0.1)), {}, "3 samples are too few.* would have 3, 0; ask for fewer"),
        ((0,), {}, "empty"),
        ((-3,), {}, "empty"),
        ((10,), {"seed": -1}, "seed"),
        ((10,), {"labels": [1, 2]}, "2 labels for 10 samples"),
        ((3, (0.5, 0.5)), {"labels": [1, "a", 2]}, "one kind"),
        ((3, (0.5, 0.5)), {"labels": [1.5, 2.5, 2.5]}, "integers or strings"),
        ((3, (0.5, 0.5)), {"groups": [[1], [2], [3]]}, "one dimension"),
        ((3, (0.5, 0.5)), {"groups": [1, 1, 1]}, "1 groups for 2 parts"),
        ((3, (0.5, 0.5)), {"labels": [1, 1, 2], "groups": [1, 1, 2]}, "both"),
    ],
)
def test_bad_arguments(args, options, words):
    with pytest.raises(DataError, match=words):
        split(*args, **options)
