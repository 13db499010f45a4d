"""Samplers under a DataLoader: every sample once over all ranks, with and without workers."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import mpiddl
from mpiddl.data.loading import loaders

pytestmark = pytest.mark.thorough


def dataset(length):
    return TensorDataset(torch.arange(length), torch.arange(length) * 0.5)


@pytest.mark.parametrize("length", [4, 7, 64, 101])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_sample_once_per_epoch(world, agree, length, drop_last):
    samples = dataset(length)
    batches = mpiddl.ShardBatchSampler(samples, world, batch_size=10, drop_last=drop_last)
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=batches.collate)
    for epoch in range(2):
        batches.set_epoch(epoch)
        mine = [(indices.tolist(), batches.total) for indices, _ in loader]
        everyones = MPI.COMM_WORLD.allgather(mine)

        agree(len({len(parts) for parts in everyones}) == 1, "ranks make different steps")
        seen = [index for parts in everyones for part, _ in parts for index in part]
        kept = length - length % 10 if drop_last else length
        agree(len(seen) == len(set(seen)) == kept, sorted(seen))
        for step in zip(*everyones, strict=True):
            sizes, totals = [len(part) for part, _ in step], {total for _, total in step}
            agree(totals == {sum(sizes)} and max(sizes) - min(sizes) <= 1, step)


@pytest.mark.host
def test_forkserver_workers(world, agree):
    samples = dataset(53)
    batches = mpiddl.ShardBatchSampler(samples, world, batch_size=8)
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=batches.collate,
        num_workers=2,
        multiprocessing_context="forkserver",
    )

    counts = [(len(indices), batches.total_at(step)) for step, (indices, _) in enumerate(loader)]

    everyones = MPI.COMM_WORLD.allgather(counts)
    sums = [sum(count for count, _ in step) for step in zip(*everyones, strict=True)]
    agree(sums == [total for _, total in counts] and sum(sums) == 53, everyones)


def test_total_is_refused_where_batches_are_drawn_ahead(world, agree):
    batches = mpiddl.ShardBatchSampler(40, world, batch_size=8)
    ahead = iter(batches)
    next(ahead), next(ahead)
    with pytest.raises(RuntimeError, match="total_at"):
        batches.total  # noqa: B018
    agree(True)


def test_evaluation_counts_every_sample_once(world, agree):
    for length in (1, 3, 50):
        mine = list(mpiddl.ShardSampler(length, world))
        agree(len(mine) == len(mpiddl.ShardSampler(length, world)))
        everyones = MPI.COMM_WORLD.allgather(mine)
        agree(sorted(sum(everyones, [])) == list(range(length)), everyones)


def test_one_seed_for_weights_and_a_stream_per_rank(world, agree):
    mpiddl.seed(4)
    same = torch.rand(3).tolist()
    mpiddl.seed(4, rank=world.rank)
    own = torch.rand(3).tolist()

    agree(len({tuple(value) for value in MPI.COMM_WORLD.allgather(same)}) == 1)
    agree(len({tuple(value) for value in MPI.COMM_WORLD.allgather(own)}) == world.size)
    agree(same != own)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(4)


@pytest.mark.parametrize("told", [True, False])
def test_a_stream_that_may_not_find_its_rank_is_hinted_at(world, agree, caplog, monkeypatch, told):
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size)):
        monkeypatch.setenv(name, str(value)) if told else monkeypatch.delenv(name, False)
    loaders._hint.cache_clear()
    mpiddl.data.loader(mpiddl.data.ShardedStream(Stream(), world))
    agree(caplog.text == "", caplog.text)
    mpiddl.data.loader(Stream())
    expected = not told and world.rank == 0 and world.size > 1
    agree(("wrap it in mpiddl.data.ShardedStream" in caplog.text) == expected, caplog.text)
