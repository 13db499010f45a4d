"""One global order: the global batch is the same set for every world size."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from mpiddl.data.shards.batches import ShardBatchSampler
from mpiddl.data.shards.kinds import sharding
from mpiddl.data.shards.samplers import ShardSampler
from mpiddl.errors import DataError


def place(rank, size):
    """The part of a World that samplers read."""
    return SimpleNamespace(rank=rank, size=size)


def global_batches(length, size, epoch=0, **options):
    samplers = [ShardBatchSampler(length, place(rank, size), **options) for rank in range(size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(parts) for parts in zip(*samplers, strict=True)]


@given(
    length=st.integers(4, 120),
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
        (seed, epoch): sum(global_batches(50, 1, epoch, batch_size=7, seed=seed), [])
        for seed in range(3)
        for epoch in range(3)
    }
    assert len({str(order) for order in orders.values()}) == 9
    assert sum(global_batches(50, 1, 1, batch_size=7, seed=2), []) == orders[2, 1]
    plain = sum(global_batches(5, 1, 3, batch_size=2, shuffle=False), [])
    assert plain == [[0, 1], [2, 3], [4]]


KINDS = [None, "contiguous", "strided", "hash", "grouped", "stratified", "weighted", "balanced"]


def options_of(kind, length, size):
    return {
        "hash": {"keys": [f"k{index}" for index in range(length)]},
        "grouped": {"groups": [index % 11 for index in range(length)]},
        "stratified": {"labels": [index % 7 % 3 for index in range(length)]},
        "balanced": {"labels": [index % 7 % 3 for index in range(length)]},
        "weighted": {"weights": [1.0 + rank for rank in range(size)]},
    }.get(kind, {})


def samplers_of(kind, length, size, **options):
    more = options_of(kind, length, size)
    return [
        ShardBatchSampler(length, place(rank, size), sharding=kind, **options, **more)
        for rank in range(size)
    ]


def run_steps(samplers, steps):
    """The next batches of all ranks; each is checked against its total."""
    drawn = []
    loops = [iter(sampler) for sampler in samplers]
    for _ in range(steps):
        parts = [next(loop) for loop in loops]
        totals = {sampler.total for sampler in samplers}
        assert totals == {sum(map(len, parts))}
        drawn.append(parts)
    return drawn


@pytest.mark.parametrize("kind", KINDS)
@given(
    length=st.integers(12, 150),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batch_size=st.integers(1, 30),
    epoch=st.integers(0, 2),
    draw=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_goes_on_on_any_number_of_ranks(kind, length, sizes, batch_size, epoch, draw):
    """Stopped anywhere, as often as one likes: every sample exactly once."""
    if kind == "weighted":
        sizes = sizes[:1] * len(sizes)  # a weight for each rank
    seen, state = [], None
    for number, size in enumerate(sizes):
        samplers = samplers_of(kind, length, size, batch_size=batch_size, seed=3)
        for sampler in samplers:
            sampler.set_epoch(epoch)
            if state is not None:
                sampler.load_state_dict(json.loads(json.dumps(state)))
                sampler.set_epoch(epoch)  # as loops do
        left = {len(sampler) for sampler in samplers}
        assert len(left) == 1
        steps = left.pop()
        if number < len(sizes) - 1:
            steps = draw.draw(st.integers(0, steps))
        for parts in run_steps(samplers, steps):
            seen += sum(parts, [])
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states)
        state = states[0]
    if kind == "balanced":
        alone = samplers_of(kind, length, 1, batch_size=batch_size, seed=3)
        alone[0].set_epoch(epoch)
        assert sorted(seen) == sorted(sum(sum(run_steps(alone, len(alone[0])), []), []))
    else:
        assert sorted(seen) == list(range(length))


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_after_a_stop_is_what_would_have_come(kind):
    """On the same number of ranks: the very same batches, in this epoch and the next."""
    whole = samplers_of(kind, 100, 3, batch_size=9)
    expected = run_steps(whole, len(whole[0]))
    first = samplers_of(kind, 100, 3, batch_size=9)
    run_steps(first, 4)
    state = first[0].state_dict()
    second = samplers_of(kind, 100, 3, batch_size=9)
    for sampler in second:
        sampler.load_state_dict(state)
    assert len(second[0]) == len(expected) - 4
    assert run_steps(second, len(second[0])) == expected[4:]
    for sampler in (*whole, *second):
        sampler.set_epoch(1)
    assert run_steps(second, len(whole[0])) == run_steps(whole, len(whole[0]))


@pytest.mark.parametrize("kind", ["contiguous", "strided", "hash", "grouped"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_that_keep_to_their_own(kind, shuffle):
    """Also when the epoch goes on on other ranks: then to what is theirs by then."""
    first = samplers_of(kind, 200, 2, batch_size=20, shuffle=shuffle)
    before = run_steps(first, 4)
    state = first[0].state_dict()
    second = samplers_of(kind, 200, 3, batch_size=20, shuffle=shuffle)
    for sampler in second:
        sampler.load_state_dict(state)
    after = run_steps(second, len(second[0]))
    for samplers, batches in ((first, before), (second, after)):
        for rank, sampler in enumerate(samplers):
            own = set(sampler.sharding.shard(rank, len(samplers)))
            visited = sum((parts[rank] for parts in batches), [])
            assert set(visited) <= own
            assert shuffle != (visited == sorted(visited))
        sizes = [sum(map(len, parts)) for parts in batches]
        assert max(sizes) - min(sizes) <= 2 * len(samplers)
        assert max(sizes) <= 20 + len(samplers)


@pytest.mark.parametrize("kind", ["contiguous", "strided", "hash", "grouped"])
def test_a_rank_visits_its_own_in_another_order_every_epoch(kind):
    orders = []
    for epoch in range(3):
        sampler = samplers_of(kind, 90, 3, batch_size=30, seed=5)[1]
        sampler.set_epoch(epoch)
        orders.append(sum(sampler, []))
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_ranks_take_turns_in_taking_one_more():
    sampler = samplers_of("contiguous", 40, 4, batch_size=16)[0]
    assert [sampler.total_at(step) for step in range(3)] == [13, 13, 14]


def test_state_is_refused_where_it_does_not_fit():
    state = ShardBatchSampler(50, place(0, 1), batch_size=5, seed=1).state_dict()
    for options, words in (
        ({"dataset": 51}, "number of samples: 50, here 51"),
        ({"batch_size": 6}, "batch_size: 5, here 6"),
        ({"seed": 2}, "seed: 1, here 2"),
        ({"sharding": "strided"}, "sharding's sharding: Random, here Strided"),
    ):
        arguments = {"dataset": 50, "world": place(0, 1), "batch_size": 5, "seed": 1, **options}
        with pytest.raises(DataError) as error:
            ShardBatchSampler(**arguments).load_state_dict(state)
        assert words in str(error.value)
    labels = [index % 3 for index in range(50)]
    for name, mine, other in (
        ("labels", {"labels": labels}, {"labels": labels[::-1]}),
        ("seed", {"labels": labels, "seed": 1}, {"labels": labels, "seed": 2}),
    ):
        made = [sharding("stratified", 50, **options) for options in (mine, other)]
        first, second = (
            ShardBatchSampler(50, place(0, 1), batch_size=5, sharding=each) for each in made
        )
        with pytest.raises(DataError, match=f"sharding's {name}"):
            second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match="no state"):
        ShardBatchSampler(50, place(0, 1), batch_size=5).load_state_dict({"epoch": 3})


def test_after_the_rest_of_an_epoch_comes_a_whole_one():
    """Also where nobody calls set_epoch."""
    first = ShardBatchSampler(20, place(0, 1), batch_size=5, shuffle=False)
    loop = iter(first)
    for _ in range(3):
        next(loop)
        assert first.total == 5
    second = ShardBatchSampler(20, place(0, 1), batch_size=5, shuffle=False)
    second.load_state_dict(first.state_dict())
    assert sum(second, []) == list(range(15, 20))
    assert second.state_dict(1)["past"] == [[1, 4]]
    for _ in range(2):
        assert sum(second, []) == list(range(20))


def test_shares_that_were_set_between_loops_count_in_the_next():
    sampler = ShardBatchSampler(100, place(0, 2), batch_size=10)
    for weights in ([4, 1], [3, 2]):
        list(sampler)
        sampler.set_shares(weights, sampler.drawn)
        assert [len(part) for part in sampler] == [2 * weights[0]] * 10
    state = ShardBatchSampler(100, place(0, 2), batch_size=10).state_dict()
    sampler.load_state_dict(state)
    assert [len(part) for part in sampler] == [5] * 10


def test_a_sharding_for_other_data_is_refused():
    made = sharding("strided", 6)
    for make in (
        ShardSampler,
        lambda *arguments, **o: ShardBatchSampler(*arguments, batch_size=2, **o),
    ):
        with pytest.raises(DataError, match="made for 6 samples, the data set has 10"):
            make(10, place(0, 2), sharding=made)
    resampled = sharding("balanced", 10, labels=[0, 1] * 5, draws=30)
    assert len(ShardSampler(10, place(0, 2), sharding=resampled)) == 15


def test_a_loader_that_drew_ahead_must_say_how_far_its_loop_is():
    sampler = ShardBatchSampler(50, place(0, 1), batch_size=5)
    loop = iter(sampler)
    for _ in range(4):
        next(loop)
    with pytest.raises(RuntimeError, match=r"state_dict\(step\)"):
        sampler.state_dict()
    assert sampler.state_dict(2)["past"] == [[1, 2]]
    with pytest.raises(IndexError, match="step 11"):
        sampler.state_dict(11)


def test_shares_move_from_the_step_that_was_named():
    samplers = samplers_of(None, 400, 2, batch_size=40)
    loops = [iter(sampler) for sampler in samplers]
    lengths = []
    seen = []
    for step in range(10):
        parts = [next(loop) for loop in loops]
        seen += sum(parts, [])
        lengths.append([len(part) for part in parts])
        if step == 2:
            for sampler in samplers:
                sampler.set_shares([3, 1], 5)
                assert sampler.shares_at(sampler.drawn) == [0.5, 0.5]
    assert lengths == [[20, 20]] * 5 + [[30, 10]] * 5
    assert sorted(seen) == list(range(400))
    assert samplers[0].shares_at(samplers[0].drawn) == [0.75, 0.25]
    state = samplers[0].state_dict(10)
    for sampler in samplers:
        with pytest.raises(ValueError, match="drawn already"):
            sampler.set_shares([1, 1], 9)
        sampler.set_epoch(1)
    assert [len(part) for part in run_steps(samplers, 1)[0]] == [30, 10]
    again = ShardBatchSampler(400, place(0, 2), batch_size=40)
    again.load_state_dict(state)
    assert again.shares_at(again.drawn) == [0.75, 0.25]
    with pytest.raises(DataError, match="its own samples"):
        samplers_of("strided", 40, 2, batch_size=4)[0].set_shares([1, 2], 3)


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
@pytest.mark.parametrize("kind", [None, "strided", "hash", "stratified"])
def test_evaluation_is_exact(length, shuffle, kind):
    options = {"sharding": kind, **options_of(kind, length, 3), "shuffle": shuffle}
    samplers = [ShardSampler(length, place(rank, 3), **options) for rank in range(3)]
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
        (lambda: ShardBatchSampler(3, place(0, 4), batch_size=1), "3 samples for 4 ranks"),
        (lambda: ShardBatchSampler(5, place(0, 1), batch_size=1, sharding="x"), "no sharding"),
        (lambda: ShardBatchSampler(5, place(0, 1), batch_size=1, labels=[0] * 5), "no labels"),
        (
            lambda: ShardBatchSampler(
                5, place(0, 1), batch_size=1, sharding="balanced", labels=[0] * 5, shuffle=False
            ),
            "random order",
        ),
        (lambda: ShardBatchSampler(5, place(0, 1), batch_size=0), "batch_size"),
        (lambda: ShardBatchSampler(5, place(0, 1), batch_size=1, seed=-1), "seed"),
        (lambda: ShardSampler(0, place(0, 1)), "empty"),
        (lambda: ShardSampler(5, place(0, 1)).set_epoch(-1), "epoch"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
