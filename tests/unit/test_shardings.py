"""Every sample once, on the rank that it should be on."""

from __future__ import annotations

from math import ceil, floor

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiddl.data.shards.kinds import SHARDINGS, sharding
from mpiddl.data.shards.kinds.base import Ordered, Owned
from mpiddl.data.shards.kinds.hashed import _owners, _range_of, hashes_of
from mpiddl.errors import DataError

EXACT = sorted(set(SHARDINGS) - {"balanced"})
NOBODY = numpy.uint32(0)


def options_of(name, length, size, draw_label=lambda index: index * index % 5):
    labels = [draw_label(index) for index in range(length)]
    return {
        "stratified": {"labels": labels},
        "balanced": {"labels": labels},
        "weighted": {"weights": [1.0 + rank for rank in range(size)]},
        "grouped": {"groups": [f"g{index % max(size, 7)}" for index in range(length)]},
        "hash": {"keys": [f"key {index}" for index in range(length)]},
    }.get(name, {})


def shards_of(name, length, size, epoch=0, **options):
    dealt = sharding(name, length, **options)
    return [numpy.asarray(dealt.shard(rank, size, epoch)) for rank in range(size)]


@pytest.mark.parametrize("name", EXACT)
@given(
    length=st.integers(8, 300),
    size=st.integers(1, 7),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_sample_exactly_once(name, length, size, epoch, seed):
    options = options_of(name, length, size)
    shards = shards_of(name, length, size, epoch, seed=seed, **options)

    assert sorted(numpy.concatenate(shards).tolist()) == list(range(length))
    again = shards_of(name, length, size, epoch, seed=seed, **options)
    assert all(numpy.array_equal(*pair) for pair in zip(shards, again, strict=True))


@pytest.mark.parametrize("name", ["contiguous", "strided", "random", "stratified"])
@given(length=st.integers(1, 300), size=st.integers(1, 9))
@settings(deadline=None)
def test_shares_differ_by_one_at_most(name, length, size):
    lengths = [
        len(part) for part in shards_of(name, length, size, **options_of(name, length, size))
    ]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("name", ["contiguous", "strided", "hash", "grouped"])
@given(length=st.integers(8, 300), size=st.integers(1, 7))
@settings(deadline=None)
def test_owners_are_those_who_have_them(name, length, size):
    dealt = sharding(name, length, **options_of(name, length, size))
    assert isinstance(dealt, Owned)
    owners = dealt.owners(numpy.arange(length), size)
    for rank in range(size):
        assert numpy.array_equal(
            numpy.flatnonzero(owners == rank), numpy.asarray(dealt.shard(rank, size))
        )
    assert dealt.lengths(size) == [len(dealt.shard(rank, size)) for rank in range(size)]


def test_what_changes_with_the_epoch():
    for name in SHARDINGS:
        options = options_of(name, 200, 2)
        first, second = (shards_of(name, 200, 2, epoch, **options)[0] for epoch in (0, 1))
        changes = name in ("random", "weighted", "stratified", "balanced")
        assert numpy.array_equal(first, second) != changes, name


# Hash.


@given(size=st.integers(1, 8), growth=st.integers(0, 500))
@settings(deadline=None)
def test_samples_stay_where_they_are_when_the_data_set_grows(size, growth):
    for keys in (None, [f"k{index}" for index in range(500 + growth)]):
        small = shards_of("hash", 500, size, keys=None if keys is None else keys[:500])
        large = shards_of("hash", 500 + growth, size, keys=keys)
        for before, after in zip(small, large, strict=True):
            assert numpy.array_equal(before, after[after < 500])


def test_a_key_has_one_rank_wherever_its_sample_is():
    keys = numpy.array([2**40 + 7, 3, 3, 2**40 + 7, -5, -5, 2**40 + 7, 3])
    owners = sharding("hash", 8, keys=keys).owners(numpy.arange(8), 4)
    assert len({owner for key, owner in zip(keys, owners, strict=True) if key == 3}) == 1
    assert owners[0] == owners[3] == owners[6]
    assert owners[4] == owners[5]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 48])
def test_every_hash_is_in_the_range_of_its_owner(size):
    ranges = [_range_of(rank, size) for rank in range(size)]
    borders = numpy.array([int(low) for low, _ in ranges], dtype=numpy.uint32)
    hashes = numpy.concatenate([borders, borders - numpy.uint32(1), borders + numpy.uint32(1)])
    for rank, (low, extent) in enumerate(ranges):
        inside = hashes - low <= extent
        assert numpy.array_equal(inside, _owners(hashes, size) == rank)


def test_hashes_are_even_and_a_seed_changes_them():
    for keys in (numpy.arange(100_000), numpy.arange(100_000) << 33, numpy.arange(100_000) * 1024):
        counts = numpy.bincount(hashes_of(keys, NOBODY) >> numpy.uint32(27), minlength=32)
        assert abs(counts - 3125).max() < 5 * 3125**0.5
    one, other = (
        sharding("hash", 1000, seed=seed).owners(numpy.arange(1000), 2) for seed in (0, 1)
    )
    assert 400 < (one == other).sum() < 600


def test_few_keys_for_many_samples():
    shards = shards_of("hash", 10_000, 4, keys=[7] * 10_000)
    assert sorted(len(part) for part in shards) == [0, 0, 0, 10_000]


# Stratified.


def some_labels(largest, shortest, longest):
    """Long lists as often as short ones, which ``st.lists`` does not draw."""
    lengths = st.integers(shortest, longest)
    return lengths.flatmap(
        lambda length: st.lists(st.integers(0, largest), min_size=length, max_size=length)
    )


@given(
    labels=some_labels(4, 1, 200),
    size=st.integers(1, 6),
    batch_size=st.integers(1, 50),
    drop_last=st.booleans(),
    epoch=st.integers(0, 1),
)
@settings(deadline=None, max_examples=300)
def test_class_mix_of_ranks_and_of_batches(labels, size, batch_size, drop_last, epoch):
    known = numpy.array(labels)
    dealt = sharding("stratified", len(labels), labels=labels)
    assert isinstance(dealt, Ordered)
    batches = dealt.batches(epoch, batch_size, drop_last)
    classes = numpy.unique(known)
    on_ranks = numpy.zeros((size, len(classes)), dtype=int)
    seen: list[int] = []
    uneven = 0
    for step in range(len(batches)):
        parts = [batches.part(step, rank, size, None) for rank in range(size)]
        batch = numpy.concatenate(parts)
        seen += batch.tolist()
        assert len(batch) == batches.total(step) <= batch_size
        for column, name in enumerate(classes):
            on_ranks[:, column] += [(known[part] == name).sum() for part in parts]
            share = (known == name).sum() / len(batches)
            count = (known[batch] == name).sum()
            if not drop_last:
                assert floor(share) <= count <= ceil(share)
            assert abs(count - len(batch) * (known == name).mean()) < 2
        lengths = [len(part) for part in parts]
        uneven += max(lengths) - min(lengths) > 1
    assert (on_ranks.max(axis=0) - on_ranks.min(axis=0) <= 1).all()
    assert len(set(seen)) == len(seen)
    assert len(seen) == (len(labels) // batch_size * batch_size if drop_last else len(labels))
    assert uneven <= size
    for part in shards_of("stratified", len(labels), size, epoch, labels=labels):
        counts = [(known[part] == name).sum() for name in classes]
        wanted = [(known == name).sum() / size for name in classes]
        assert all(floor(w) <= c <= ceil(w) for w, c in zip(wanted, counts, strict=True))


@given(labels=some_labels(3, 4, 120), size=st.integers(1, 4))
@settings(deadline=None)
def test_uneven_shares_of_a_stratified_batch(labels, size):
    dealt = sharding("stratified", len(labels), labels=labels)
    shares = numpy.arange(1, size + 1) / (size * (size + 1) / 2)
    batches = dealt.batches(0, 16, False)
    for step in range(len(batches)):
        parts = [batches.part(step, rank, size, shares) for rank in range(size)]
        whole = [batches.part(step, rank, 1, None) for rank in range(1)]
        assert sorted(numpy.concatenate(parts).tolist()) == sorted(whole[0].tolist())


def test_uneven_parts_have_the_mix_of_their_batch():
    labels = numpy.repeat([0, 1], 100)
    batches = sharding("stratified", 200, labels=labels).batches(0, 20, False)
    for step in range(len(batches)):
        for rank in range(3):
            part = batches.part(step, rank, 3, numpy.array([0.2, 0.5, 0.3]))
            assert abs(2 * labels[part].sum() - len(part)) <= 1


# Weighted, balanced, grouped.


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    length=st.integers(1, 400),
)
@settings(deadline=None)
def test_weights_are_shares(weights, length):
    lengths = [len(part) for part in shards_of("weighted", length, len(weights), weights=weights)]
    for got, weight in zip(lengths, weights, strict=True):
        assert abs(got - length * weight / sum(weights)) < 1 + 1e-6


@given(
    weights=st.lists(st.floats(0.05, 10), min_size=2, max_size=5),
    length=st.integers(50, 400),
    batch_size=st.integers(1, 60),
)
@settings(deadline=None, max_examples=50)
def test_weights_hold_in_the_long_run_and_lose_nothing(weights, length, batch_size):
    size = len(weights)
    shares = numpy.array(weights) / sum(weights)
    batches = sharding("weighted", length, weights=weights).batches(0, batch_size, False)
    parts = [
        [batches.part(step, rank, size, shares).tolist() for step in range(len(batches))]
        for rank in range(size)
    ]
    assert sorted(sum((sum(rank, []) for rank in parts), [])) == list(range(length))
    for rank in range(size):
        assert abs(len(sum(parts[rank], [])) - length * shares[rank]) <= 4


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batch_size=st.integers(1, 40),
)
@settings(deadline=None)
def test_resampling_balances_every_batch(counts, batch_size):
    labels = numpy.repeat(numpy.arange(len(counts)), counts)
    dealt = sharding("balanced", len(labels), labels=labels)
    batches = dealt.batches(0, batch_size, False)
    drawn = [batches.part(step, 0, 1, None) for step in range(len(batches))]
    for batch in drawn:
        per_class = numpy.bincount(labels[batch], minlength=len(counts))
        assert per_class.max() - per_class.min() <= 1
    times = numpy.bincount(numpy.concatenate(drawn), minlength=len(labels))
    for number in range(len(counts)):
        of_class = times[labels == number]
        assert of_class.max() - of_class.min() <= 1
    assert sum(len(batch) for batch in drawn) == len(labels)
    assert len(sharding("balanced", len(labels), labels=labels, draws=500).shard(0, 1)) == 500


def test_each_round_through_a_rare_class_has_its_own_order():
    labels = numpy.repeat(["often", "rare"], [100, 8])
    drawn = sharding("balanced", 108, labels=labels, draws=160).shard(0, 1)
    rounds = drawn[labels[drawn] == "rare"].reshape(10, 8)
    assert all(sorted(each) == list(range(100, 108)) for each in rounds.tolist())
    assert len({tuple(each) for each in rounds.tolist()}) == 10


def test_large_groups_are_placed_first():
    groups = [0, 1, 2, 3, *[4] * 4]
    assert [len(part) for part in shards_of("grouped", 8, 2, groups=groups)] == [4, 4]


@given(
    groups=st.lists(st.integers(0, 12), min_size=20, max_size=200),
    size=st.integers(1, 4),
)
@settings(deadline=None)
def test_groups_stay_whole_and_ranks_are_even(groups, size):
    known = numpy.array(groups)
    if len(set(groups)) < size:
        with pytest.raises(DataError, match="groups for"):
            shards_of("grouped", len(groups), size, groups=groups)
        return
    shards = shards_of("grouped", len(groups), size, groups=groups)
    homes = [set(known[part].tolist()) for part in shards]
    assert sum(len(home) for home in homes) == len(set(groups))
    largest = max(numpy.bincount(known))
    assert max(map(len, shards)) - min(map(len, shards)) <= largest


def objects(*values):
    """An array as pandas makes of a column of strings."""
    array = numpy.empty(len(values), dtype=object)
    array[:] = values
    return array


def test_labels_may_be_tensors_arrays_or_words():
    words = ["b", "a", "b", "c"]
    expected = shards_of("stratified", 4, 2, labels=words)
    for labels in (
        numpy.array(words),
        torch.tensor([1, 0, 1, 2]),
        (1, 0, 1, 2),
        numpy.array([1, 0, 1, 2], "u1"),
        objects(*words),
        objects("b", numpy.str_("a"), "b", "c"),
        objects(1, numpy.int8(0), 1, 2),
        numpy.array(words, numpy.dtypes.StringDType()),
    ):
        got = shards_of("stratified", 4, 2, labels=labels)
        assert all(numpy.array_equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("keys", [["b", "a", "ä", ""], [3, -1, 2**40, 0]])
def test_keys_may_be_objects(keys):
    expected, got = (
        sharding("hash", 4, keys=names).owners(numpy.arange(4), 1000)
        for names in (keys, objects(*keys))
    )
    assert numpy.array_equal(got, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sharding("magic", 5), "'magic' is no sharding; choose from contiguous"),
        (lambda: sharding("contiguous", 0), "empty"),
        (lambda: sharding("contiguous", 5, labels=[1] * 5), "takes no labels"),
        (lambda: sharding("stratified", 5), "needs labels="),
        (lambda: sharding("stratified", 5, labels=[1, 2]), "2 labels for 5 samples"),
        (lambda: sharding("stratified", 2, labels=[1, "a"]), "one kind, got int, str"),
        (lambda: sharding("stratified", 2, labels=[0.5, 1.5]), "integers or strings, got float64"),
        (lambda: sharding("stratified", 2, labels=[[1], [2]]), "one dimension"),
        (lambda: sharding("balanced", 2, labels=[True, 3]), "one kind, got bool, int"),
        (lambda: sharding("balanced", 2, labels=[1, 1], draws=0), "empty"),
        (
            lambda: sharding("hash", 3, keys=[1, "a", 2]),
            "keys must all be of one kind, got int, str",
        ),
        (lambda: sharding("hash", 3, keys=[1.5, 2.0, 3.0]), "got float"),
        (lambda: sharding("hash", 2, keys=[True, False]), "or all be strings, got bool"),
        (lambda: sharding("hash", 3, keys=[1]), "1 keys for 3 samples"),
        (lambda: sharding("hash", 2, keys=[[1], [2]]), "keys must have one dimension"),
        (lambda: sharding("hash", 2, keys=objects(1, "a")), "one kind, got int, str"),
        (lambda: sharding("stratified", 2, labels=objects("a", None)), "got NoneType, str"),
        (lambda: sharding("stratified", 2, labels=objects([1], [1, 2])), "strings, got object"),
        (lambda: sharding("stratified", 2, labels=objects(0.5, 1.5)), "strings, got object"),
        (lambda: sharding("grouped", 2, groups=[None, 1]), "one kind"),
        (lambda: sharding("weighted", 4, weights=[1.0, 0.0]), "positive"),
        (lambda: sharding("weighted", 4, weights=[1.0, float("nan")]), "positive"),
        (lambda: sharding("weighted", 4, weights=[1.0]).shard(0, 2), "1 weights for 2 ranks"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(DataError) as error:
        make()
    assert words in str(error.value)
