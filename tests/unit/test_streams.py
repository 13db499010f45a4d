"""Every item of a stream goes to one reader, and an epoch goes on where it was left."""

from __future__ import annotations

import os
from contextlib import contextmanager
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from mpiddl.data.loading.loaders import loader
from mpiddl.data.loading.streams import ShardedStream
from mpiddl.errors import DataError


def place(rank, size):
    """The part of a World that streams read."""
    return SimpleNamespace(rank=rank, size=size)


@contextmanager
def as_worker(number, workers):
    """What torch tells loader workers about themselves; a rank without workers is told nothing."""
    if workers > 0:
        torch_worker._worker_info = SimpleNamespace(id=number, num_workers=workers)
    try:
        yield
    finally:
        torch_worker._worker_info = None


def shares(stream_of, size, workers):
    """Items of each rank and worker."""
    found = {}
    for rank in range(size):
        stream = stream_of(place(rank, size))
        for worker in range(max(1, workers)):
            with as_worker(worker, workers):
                found[rank, worker] = list(stream)
    return found


def numbers_in(path):
    """A file that is called "4x7" holds seven numbers, from 400 on."""
    number, length = path.split("x")
    return range(100 * int(number), 100 * int(number) + int(length))


# --- shares


@given(
    length=st.integers(0, 60),
    size=st.integers(1, 4),
    workers=st.integers(0, 3),
    buffer=st.integers(0, 8),
    epoch=st.integers(0, 2),
)
@settings(deadline=None)
def test_every_item_goes_to_one_reader(length, size, workers, buffer, epoch):
    def stream_of(world):
        stream = ShardedStream(range(length), world, shuffle_buffer=buffer, seed=3)
        stream.set_epoch(epoch)
        return stream

    found = shares(stream_of, size, workers)

    assert sorted(sum(found.values(), [])) == list(range(length))
    counts = [0] * size
    for (rank, _), items in found.items():
        assert all(item % size == rank for item in items)  # whatever the number of workers
        counts[rank] += len(items)
        if buffer == 0:
            assert items == sorted(items)
    assert max(counts) - min(counts) <= 1


class DividesItself(IterableDataset):
    """As datasets' and webdataset's streams do, by loader worker and by torchrun's variables."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        yield from range(rank + size * worker, self.length, size * workers)


def files_of(source, world):
    return ShardedStream.of_files(["0x9", "1x9", "2x9", "3x9"], lambda _: source, world)


@pytest.mark.parametrize("told", [True, False], ids=["RANK is set", "RANK is not set"])
@pytest.mark.parametrize("deal", [ShardedStream, files_of])
def test_a_source_that_divides_itself_is_divided_once(monkeypatch, told, deal):
    found = []
    for rank in range(2):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value)) if told else monkeypatch.delenv(name, False)
        stream = deal(DividesItself(23), place(rank, 2))
        for worker in range(2):
            with as_worker(worker, 2):
                for item in stream:
                    found.append(item)
                    assert get_worker_info().id == worker  # as it was, between two items
                    assert os.environ.get("RANK") == (str(rank) if told else None)
    copies = 4 if deal is files_of else 1
    assert sorted(found) == sorted([*range(23)] * copies)


def test_a_source_that_fails_leaves_all_as_it_was(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with as_worker(1, 2):
        with pytest.raises(ZeroDivisionError):
            list(ShardedStream(lambda: (1 // zero for zero in [0]), place(0, 1)))
        assert get_worker_info().id == 1
        assert os.environ["RANK"] == "5"


def test_workers_may_differ_between_ranks():
    found = []
    for rank, workers in enumerate([0, 3, 2]):
        stream = ShardedStream(range(31), place(rank, 3))
        for worker in range(max(1, workers)):
            with as_worker(worker, workers):
                found += stream
    assert sorted(found) == list(range(31))


def test_a_source_is_called_for_every_pass():
    stream = ShardedStream(lambda: iter(range(4)), place(1, 2))

    assert list(stream) == list(stream) == [1, 3]


def test_the_shuffle_depends_on_epoch_seed_rank_and_worker():
    def order(epoch=0, seed=0, rank=0, worker=0):
        stream = ShardedStream(range(200), place(rank, 2), shuffle_buffer=16, seed=seed)
        stream.set_epoch(epoch)
        with as_worker(worker, 2):
            return [item // 4 for item in stream]  # alike for all, but for the order

    orders = [order(), order(epoch=1), order(seed=1), order(rank=1), order(worker=1)]
    assert len({tuple(order) for order in orders}) == 5
    assert order() == order()
    assert order() != sorted(order())
    assert len({order(seed=seed)[0] for seed in range(20)}) > 5
    # An item leaves the buffer at the earliest when that is full.
    assert all(item <= position + 16 for position, item in enumerate(order()))


def test_a_buffer_as_long_as_the_stream_shuffles_all_of_it():
    first = set()
    for epoch in range(60):
        stream = ShardedStream(range(5), place(0, 1), shuffle_buffer=100)
        stream.set_epoch(epoch)
        first.add(next(iter(stream)))
    assert first == set(range(5))


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match="only once; pass a function"):
        ShardedStream(iter([1]), place(0, 1))
    for options in [{"shuffle_buffer": -1}, {"seed": -1}]:
        with pytest.raises(ValueError, match="must not be negative"):
            ShardedStream([1], place(0, 1), **options)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        ShardedStream([1], place(0, 1)).set_epoch(-1)


# --- files


@given(
    lengths=st.lists(st.integers(0, 9), min_size=6, max_size=14),
    size=st.integers(1, 3),
    workers=st.integers(0, 2),
    buffer=st.sampled_from([0, 4]),
    epoch=st.integers(0, 2),
)
@settings(deadline=None)
def test_every_file_goes_to_one_reader(lengths, size, workers, buffer, epoch):
    paths = [f"{number}x{length}" for number, length in enumerate(lengths)]

    def stream_of(world):
        stream = ShardedStream.of_files(paths, numbers_in, world, shuffle_buffer=buffer)
        stream.set_epoch(epoch)
        return stream

    found = shares(stream_of, size, workers)

    assert sorted(sum(found.values(), [])) == sorted(i for path in paths for i in numbers_in(path))
    owners = [{item // 100 for item in items} for items in found.values()]
    assert sum(len(files) for files in owners) == sum(length > 0 for length in lengths)


def test_files_in_any_order_are_the_same_stream():
    paths = ["2x3", "1x3", "3x3"]
    streams = [
        ShardedStream.of_files(order, numbers_in, place(0, 2)) for order in (paths, paths[::-1])
    ]
    assert list(streams[0]) == list(streams[1]) == [100, 101, 102, 300, 301, 302]


def test_files_are_dealt_out_anew_every_epoch():
    stream = ShardedStream.of_files(
        [f"{i}x1" for i in range(10, 30)], numbers_in, place(0, 2), shuffle_buffer=1
    )
    owned = set()
    for epoch in range(3):
        stream.set_epoch(epoch)
        owned.add(frozenset(stream))
    assert len(owned) == 3


def test_fewer_files_than_readers_are_refused():
    stream = ShardedStream.of_files(["1x3", "2x3", "3x3"], numbers_in, place(0, 2))

    assert list(stream) == [100, 101, 102, 300, 301, 302]
    with as_worker(0, 2), pytest.raises(DataError, match=r"3 files for 4 readers \(2 ranks, 2 "):
        iter(stream)


# --- going on in the middle


def batches_of(stream, workers, batch_size, drop_last=False):
    """The order in which a DataLoader hands out batches (see tests/jobs for a real one)."""
    readers = []
    for worker in range(max(1, workers)):
        with as_worker(worker, workers):
            readers.append(iter(stream))
    while readers:
        for reader in list(readers):
            batch = list(islice(reader, batch_size))
            if len(batch) < batch_size:
                readers.remove(reader)
            if len(batch) == batch_size or (batch and not drop_last):
                yield batch


def announced(workers, batch_size, drop_last=False):
    """A loader that is asked for its numbers only."""
    return SimpleNamespace(num_workers=workers, batch_size=batch_size, drop_last=drop_last)


@given(
    length=st.integers(0, 40),
    workers=st.integers(0, 3),
    batch_size=st.integers(1, 5),
    drop_last=st.booleans(),
    buffer=st.sampled_from([0, 3]),
    taken=st.lists(st.integers(0, 40), min_size=2, max_size=2),
)
@settings(deadline=None)
def test_an_epoch_goes_on_where_it_was_left(length, workers, batch_size, drop_last, buffer, taken):
    """Twice: left, gone on, left again, gone on."""

    def fresh(state=None):
        stream = ShardedStream(range(length), place(0, 2), shuffle_buffer=buffer)
        stream.set_epoch(4)
        if state is not None:
            stream.load_state_dict(state)
            stream.set_epoch(4)  # as a loop over epochs would
        return stream

    how = (workers, batch_size, drop_last)
    whole = list(batches_of(fresh(), *how))
    state, before = None, 0
    for count in sorted(min(count, len(whole)) for count in taken):
        state = fresh(state).state_dict(count - before, announced(*how))
        before = count
        assert list(batches_of(fresh(state), *how)) == whole[count:]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_loop_counts_its_own_batches(workers):
    """As in the guide: enumerate(batches, start=1), in a job that is stopped twice."""
    how = (workers, 2)
    whole = list(batches_of(ShardedStream(range(24), place(0, 1)), *how))
    state, seen = None, []
    for stop in (3, 2, 4):
        stream = ShardedStream(range(24), place(0, 1))
        if state is not None:
            stream.load_state_dict(state)
        stream.set_epoch(0)
        for taken, batch in enumerate(batches_of(stream, *how), start=1):
            seen.append(batch)
            state = stream.state_dict(taken, announced(*how))
            if taken == stop:
                break
    assert seen == whole[:9]
    assert state["taken"] == 9

    stream.set_epoch(1)  # which begins at its beginning
    assert stream.state_dict(1, announced(*how))["taken"] == 1


def test_loaders_that_count_otherwise_are_refused_in_the_middle():
    stream = ShardedStream(range(24), place(0, 1))
    stream.load_state_dict(stream.state_dict(3, announced(2, 4)))
    for loading, words in [
        (announced(2, 3), "saved with batch_size 4, but this is batch_size 3"),
        (announced(0, 4), "saved with workers 2, but this is workers 1"),
        (None, "batch_size 4, workers 2, but"),
    ]:
        with pytest.raises(DataError, match=words):
            stream.state_dict(1, loading)
    stream.set_epoch(1)
    assert stream.state_dict(1, announced(0, 3))["batch_size"] == 3


@given(
    lengths=st.lists(st.integers(0, 9), min_size=4, max_size=8),
    batch_size=st.integers(1, 4),
    drop_last=st.booleans(),
    taken=st.integers(0, 30),
)
@settings(deadline=None)
def test_files_go_on_where_that_can_be_told(lengths, batch_size, drop_last, taken):
    def fresh():
        files = [f"{number}x{length}" for number, length in enumerate(lengths)]
        return ShardedStream.of_files(files, numbers_in, place(0, 1))

    how = (2, batch_size, drop_last)
    whole = list(batches_of(fresh(), *how))
    taken = min(taken, len(whole))
    rest = fresh()
    rest.load_state_dict(fresh().state_dict(taken, announced(*how)))

    items = [sum(lengths[worker::2]) for worker in range(2)]
    shares = [n // batch_size if drop_last else -(-n // batch_size) for n in items]
    had_ended = any(-((worker - taken) // 2) > shares[worker] for worker in range(2))
    if had_ended:
        with pytest.raises(DataError, match="start the next epoch"):
            list(batches_of(rest, *how))
    else:
        assert list(batches_of(rest, *how)) == whole[taken:]


def test_without_a_loader_items_are_counted():
    stream = ShardedStream(range(9), place(0, 1))
    items = iter(stream)
    assert [next(items), next(items)] == [0, 1]

    again = ShardedStream(range(9), place(0, 1))
    again.load_state_dict(stream.state_dict(2))

    assert list(again) == [2, 3, 4, 5, 6, 7, 8]


def test_another_epoch_starts_at_its_beginning():
    stream = ShardedStream(range(4), place(0, 1))
    stream.set_epoch(1)
    stream.load_state_dict(stream.state_dict(3))

    assert list(stream) == [3]
    with pytest.raises(DataError, match="epoch 1 went on in its middle, and is over"):
        iter(stream)
    stream.set_epoch(2)
    assert list(stream) == list(stream) == [0, 1, 2, 3]


def test_workers_that_live_on_hear_of_epochs_and_places():
    stream = ShardedStream(range(100), place(0, 1), shuffle_buffer=10)
    copy = ForkingPickler.loads(bytes(ForkingPickler.dumps(stream)))
    first = list(copy)

    stream.set_epoch(1)

    second = list(copy)
    assert second != first
    assert second == list(stream)
    stream.load_state_dict(stream.state_dict(60))
    assert list(copy) == second[60:]


def test_states_of_others_are_refused():
    def stream(rank=0, size=2, buffer=0, seed=0):
        return ShardedStream(range(9), place(rank, size), shuffle_buffer=buffer, seed=seed)

    state = stream().state_dict(1, announced(2, 1))
    for other, words in [
        (stream(rank=1), "saved with rank 0, but this is rank 1"),
        (stream(size=3), "saved with size 2, but this is size 3"),
        (stream(buffer=3), "shuffle_buffer 0, but"),
        (stream(seed=3), "seed 0, but"),
    ]:
        with pytest.raises(DataError, match=words):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="no state of a ShardedStream"):
        stream().load_state_dict({"rank": 0})
    same = stream()
    same.load_state_dict(state)
    for workers in (0, 3):
        with as_worker(0, workers), pytest.raises(DataError, match="saved with workers 2"):
            iter(same)


# --- loaders


class Numbers(TensorDataset):
    """A data set with one thing that another process could not find."""

    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return 3


class Quiet(Numbers):
    def __getstate__(self):
        return {}


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        (Numbers(), {}, "which samples are this rank's"),
        (Numbers(), {"batch_size": 3}, "which samples are this rank's"),
        (Numbers(), {"batch_size": 3, "shuffle": True}, "shuffle=True to the sampler"),
        (Numbers(), {"sampler": range(3)}, "batch_size is missing"),
        (Numbers(), {"sampler": range(3), "batches": [[1]]}, "not both"),
        (Numbers(), {"batches": [[1]], "batch_size": 2}, "leave out batch_size"),
        (Numbers(), {"batches": [[1]], "drop_last": True}, "leave out batch_size"),
        (Numbers(), {"batch_sampler": [[1]]}, "as batches="),
        (ShardedStream([1], place(0, 1)), {"batches": [[1]]}, "leave out batches="),
        (ShardedStream([1], place(0, 1)), {"sampler": range(3)}, "leave out sampler="),
        (ShardedStream([1], place(0, 1)), {"shuffle": True}, "leave out shuffle="),
        (Numbers(), {"num_workers": 1, "multiprocessing_context": "fork"}, "a fork of a rank"),
        (Numbers(lambda: 1), {"num_workers": 1}, "the data set's transform is <lambda>"),
        (Numbers(), {"num_workers": 1, "collate_fn": lambda x: x}, "collate_fn is <lambda>"),
    ],
)
def test_loaders_refuse_what_cannot_work(dataset, options, words):
    if "num_workers" in options:
        options = {"batches": [[1]], **options}
    with pytest.raises(ValueError, match=words):
        loader(dataset, **options)


def test_loaders_are_set_up_for_ranks():
    batches = SimpleNamespace(collate=len)
    plain = loader(Numbers(lambda: 1), batches=batches)
    assert plain.collate_fn is len
    assert plain.batch_sampler is batches
    assert not plain.pin_memory
    assert loader(Numbers(), batches=batches, collate_fn=max).collate_fn is max
    with_workers = loader(Quiet(lambda: 1), batches=batches, num_workers=2, prefetch_factor=5)
    assert with_workers.multiprocessing_context.get_start_method() == "forkserver"
    assert with_workers.persistent_workers
    assert with_workers.prefetch_factor == 5
    sampled = loader(Numbers(), sampler=range(2), batch_size=2, persistent_workers=False)
    assert sampled.batch_size == 2


def test_streams_in_a_loader():
    stream = ShardedStream(range(9), place(0, 2))

    assert [batch.tolist() for batch in loader(stream, batch_size=2)] == [[0, 2], [4, 6], [8]]
    assert list(loader(stream)) == [0, 2, 4, 6, 8]
    state = stream.state_dict(1, DataLoader(stream, batch_size=2))
    assert (state["taken"], state["batch_size"], state["workers"]) == (1, 2, 1)
