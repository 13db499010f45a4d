"""A bijection, its inverse, and how random it looks. Keys are fixed: no test is lucky."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiddl.data.shards.permutation import SMALL, Permutation

LARGE = SMALL + 903  # a number of cells that leaves some over
FAR = 10.0  # standard deviations, or so: what no honest order reaches


@given(
    length=st.one_of(st.integers(0, 40), st.integers(SMALL - 2, SMALL + 2000)),
    key=st.lists(st.integers(0, 2**40), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_every_place_once_and_back(length, key):
    permutation = Permutation(length, key)
    indices = permutation[:]

    assert numpy.array_equal(numpy.sort(indices), numpy.arange(length))
    assert numpy.array_equal(permutation.places_of(indices), numpy.arange(length))
    assert numpy.array_equal(permutation.at(numpy.arange(length)[::-1]), indices[::-1])


@given(length=st.integers(1, 3 * SMALL), start=st.integers(0, 9999), step=st.integers(1, 9))
@settings(deadline=None)
def test_a_part_is_the_part_of_the_whole(length, start, step):
    permutation = Permutation(length, [5])
    assert numpy.array_equal(
        permutation[start : start + 3000 : step], permutation[:][start:][:3000:step]
    )


@pytest.mark.parametrize("length", [2**31 - 5, 2**31 + 5, 10**12])
def test_ranges_that_nobody_could_hold(length):
    permutation = Permutation(length, [1])
    places = numpy.linspace(0, length - 1, 5000).astype(numpy.int64)
    indices = permutation.at(places)

    assert indices.min() >= 0
    assert indices.max() < length
    assert len(numpy.unique(indices)) == len(numpy.unique(places))
    assert numpy.array_equal(permutation.places_of(indices), places)
    assert numpy.array_equal(
        permutation[length - 10 :], permutation.at(numpy.arange(length - 10, length))
    )
    assert abs(indices.mean() / length - 0.5) < 0.02  # from end to end, not a corner of it


def test_a_key_is_an_order():
    orders = [Permutation(LARGE, key)[:] for key in ([0, 0], [0, 1], [1, 0], [2])]
    for number, order in enumerate(orders):
        assert numpy.array_equal(
            order, Permutation(LARGE, ([0, 0], [0, 1], [1, 0], [2])[number])[:]
        )
        for other in orders[:number]:
            assert (order == other).sum() < 15  # one on average


def test_small_ranges_reach_every_order_equally():
    counts: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        order = tuple(Permutation(4, [key])[:].tolist())
        counts[order] = counts.get(order, 0) + 1

    assert len(counts) == 24
    assert all(abs(count - 250) < 75 for count in counts.values())  # 5 standard deviations


@pytest.mark.parametrize("length", [LARGE, 65536, 100_003])
def test_each_place_gets_each_index_equally_often(length):
    """Over keys: where a place leads, in 16 parts of the range."""
    keys = 400
    places = numpy.arange(0, length, length // 64)
    counts = numpy.zeros((len(places), 16))
    for key in range(keys):
        parts = Permutation(length, [key]).at(places) * 16 // length
        counts[numpy.arange(len(places)), parts] += 1
    expected = keys / 16
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = len(places) * 15
    assert abs(chi - freedom) < FAR / 2 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("length", [LARGE, 65536, 100_003])
@pytest.mark.parametrize("distance", [1, 2, 7, "column", "row"])
def test_neighbours_part(length, distance):
    """How far apart they come to be: as if each were thrown alone, also those that share a row or
    a column of the table behind."""
    side = int(length**0.5)
    step = {"column": side, "row": side + 1}.get(distance, distance)
    gaps = []
    for key in range(8):
        order = Permutation(length, [key])[:]
        gaps.append((order[step:] - order[:-step]) % length)
    gaps = numpy.concatenate(gaps) * 32 // length
    counts = numpy.bincount(gaps, minlength=32)
    expected = len(gaps) / 32
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - 31) < FAR * 62**0.5, counts


@pytest.mark.parametrize("length", [LARGE, 65536])
def test_windows_are_fair_samples(length):
    """Means of consecutive places (of global batches) spread as random samples' do, not less."""
    means = []
    for key in range(20):
        order = Permutation(length, [key])[: length // 64 * 64]
        means.append(order.reshape(-1, 64).mean(axis=1) / length)
    spread = numpy.concatenate(means).std()
    assert abs(spread / (1 / (12 * 64) ** 0.5) - 1) < 0.1


def test_bad_lengths():
    with pytest.raises(ValueError, match="cannot be permuted"):
        Permutation(-1, [0])
    with pytest.raises(ValueError, match="cannot be permuted"):
        Permutation(1 << 48, [0])
    with pytest.raises(ValueError, match="ascending"):
        Permutation(5, [0])[::-1]
