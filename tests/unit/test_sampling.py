"""One global order: the global batch is the same set for every world size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from mpiddl.data.samplers import ShardBatchSampler, ShardSampler
from mpiddl.data.shards import epoch_order, part_of


def place(rank, size):
    """The part of a World that samplers read."""
    return SimpleNamespace(rank=rank, size=size)


def global_batches(length, size, epoch=0, **options):
    samplers = [ShardBatchSampler(length, place(rank, size), **options) for rank in range(size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(parts) for parts in zip(*samplers, strict=True)]


@given(
    length=st.integers(1, 120),
    batch_size=st.integers(1, 40),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_the_global_batch_does_not_depend_on_the_world(
    length, batch_size, epoch, shuffle, drop_last
):
    options = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last, "seed": 7}
    alone = [parts[0] for parts in global_batches(length, 1, epoch, **options)]

    seen = [index for batch in alone for index in batch]
    assert len(seen) == (length - length % batch_size if drop_last else length)
    assert len(set(seen)) == len(seen)
    for size in (2, 3, 4):
        batches = global_batches(length, size, epoch, **options)
        assert [sum(parts, []) for parts in batches] == alone
        for parts in batches:
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_change_the_order():
    orders = {
        (seed, epoch): epoch_order(50, epoch, seed, True).tolist()
        for seed in range(3)
        for epoch in range(3)
    }
    assert len({tuple(order) for order in orders.values()}) == 9
    assert epoch_order(50, 1, 2, True).tolist() == orders[2, 1]
    assert epoch_order(5, 3, 1, False).tolist() == [0, 1, 2, 3, 4]


def test_parts_follow_the_order():
    parts = [part_of(numpy.arange(10), rank, 4).tolist() for rank in range(4)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


def test_lengths_and_totals():
    sampler = ShardBatchSampler(10, place(0, 2), batch_size=4)
    assert len(sampler) == 3
    assert [sampler.total_at(step) for step in range(3)] == [4, 4, 2]
    with pytest.raises(IndexError):
        sampler.total_at(3)
    with pytest.raises(RuntimeError, match="no batch"):
        sampler.total  # noqa: B018
    for step, _ in enumerate(sampler):
        assert sampler.total == sampler.total == sampler.total_at(step)
    assert len(ShardBatchSampler(10, place(0, 2), batch_size=4, drop_last=True)) == 2


@pytest.mark.parametrize("length", [1, 2, 5, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_evaluation_is_exact(length, shuffle):
    samplers = [ShardSampler(length, place(rank, 3), shuffle=shuffle) for rank in range(3)]
    seen = [list(sampler) for sampler in samplers]
    assert sorted(sum(seen, [])) == list(range(length))
    assert [len(part) for part in seen] == [len(sampler) for sampler in samplers]


def test_an_empty_part_has_the_shape_of_a_full_one():
    samples = TensorDataset(torch.ones(4, 2, 3), torch.arange(4))
    sampler = ShardBatchSampler(samples, place(0, 1), batch_size=2)

    images, labels = sampler.collate([samples[0], samples[1]])
    empty_images, empty_labels = sampler.collate([])

    assert images.shape == (2, 2, 3)
    assert empty_images.shape == (0, 2, 3)
    assert (empty_labels.shape, empty_labels.dtype) == ((0,), labels.dtype)


def test_empty_parts_of_nested_samples():
    samples = [{"x": 1.5, "pair": (torch.ones(2), "name")}]
    sampler = ShardBatchSampler(samples, place(0, 1), batch_size=2)
    empty = sampler.collate([])
    assert empty["x"].shape == (0,)
    assert empty["pair"][0].shape == (0, 2)
    assert list(empty["pair"][1]) == []
    with pytest.raises(ValueError, match="data set"):
        ShardBatchSampler(4, place(0, 1), batch_size=2).collate([])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ShardBatchSampler(0, place(0, 1), batch_size=1), "empty"),
        (lambda: ShardBatchSampler([], place(0, 1), batch_size=1), "empty"),
        (lambda: ShardBatchSampler(5, place(0, 1), batch_size=0), "batch_size"),
        (lambda: ShardBatchSampler(5, place(0, 1), batch_size=1, seed=-1), "seed"),
        (lambda: ShardSampler(0, place(0, 1)), "empty"),
        (lambda: ShardSampler(5, place(0, 1)).set_epoch(-1), "epoch"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
