"""Segments, chunks, sizes, plans: arithmetic that every rank must agree on."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpiddl.base.segments import chunked, split
from mpiddl.base.units import format_bytes, format_seconds, parse_bytes, parse_seconds
from mpiddl.collectives.broadcast import tree
from mpiddl.gradients.agreement import describe, digest, first_difference, odd_ones
from mpiddl.gradients.plan import ParameterSpec, plan_buckets

lengths = st.integers(0, 1000)


@given(lengths, st.integers(1, 20))
def test_segments_cover_everything_once_and_differ_by_one(length, parts):
    segments = split(length, parts)

    assert [i for part in segments for i in range(length)[part]] == list(range(length))
    sizes = [part.stop - part.start for part in segments]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(0, 50), lengths, st.integers(1, 60), st.integers(0, 10))
def test_chunks_cover_their_segment(start, length, chunk, extra):
    count = -(-length // chunk) + extra
    chunks = chunked(slice(start, start + length), chunk, count)

    covered = [i for part in chunks for i in range(start + length)[part]]
    assert covered == list(range(start, start + length))
    assert len(chunks) == count
    assert all(part.stop - part.start <= chunk for part in chunks)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("25MiB", 25 << 20),
        ("25 mib", 25 << 20),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("0B", 0),
        ("3TiB", 3 << 40),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1.5", "10 potatoes", "1e3", "0x10", "1I", "nan"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"not a size|whole number"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("600", 600), ("90s", 90), ("1.5 h", 5400), ("10m", 600), ("2MIN", 120), ("250ms", 0.25)],
)
def test_times_are_read(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "10 days", "1e3", "nan", "inf"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="not a time"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (2e-6, "2 us"),
        (0.01234, "12.3 ms"),
        (90, "90 s"),
        (600, "10.0 min"),
        (7200, "2.0 h"),
    ],
)
def test_times_are_printed(seconds, text):
    assert format_seconds(seconds) == text


@given(st.integers(0, 1 << 50))
def test_printed_sizes_read_back_within_their_precision(nbytes):
    assert parse_bytes_loosely(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.06)


def parse_bytes_loosely(text):
    """``1.3KiB`` is no whole number of bytes; read tenths exactly."""
    number = text.rstrip("BiKMGT")
    unit = text[len(number) :]
    return float(number) * parse_bytes("1" + unit)


@given(st.integers(1, 40), st.data())
def test_the_broadcast_tree_reaches_every_rank_once(size, data):
    root = data.draw(st.integers(0, size - 1))
    reached, front, rounds = [root], [root], 0
    while front:
        children = [(rank, child) for rank in front for child in tree(rank, size, root)[1]]
        assert all(tree(child, size, root)[0] == parent for parent, child in children)
        front = [child for _, child in children]
        reached += front
        rounds += 1

    assert sorted(reached) == list(range(size))
    assert tree(root, size, root)[0] is None
    assert rounds - 1 <= (size - 1).bit_length()  # levels below the root


dtypes = st.sampled_from([("float32", 4), ("bfloat16", 2), ("float64", 8)])


@st.composite
def models(draw):
    specs = draw(st.lists(st.tuples(st.integers(0, 300), dtypes), min_size=1, max_size=30))
    return [
        ParameterSpec(f"p{number}", (length,), (1,), dtype, itemsize)
        for number, (length, (dtype, itemsize)) in enumerate(specs)
    ]


EMPTY_AT_THE_CUT = [
    ParameterSpec(f"p{number}", (length,), (1,), "float32", 4)
    for number, length in enumerate([3, 0, 0, 0, 40])
]


@given(models(), st.integers(1, 2000), st.integers(1, 2000), st.randoms())
@example(EMPTY_AT_THE_CUT, 64, 40, Random(0))
def test_every_gradient_has_one_place(specs, capacity, edge_capacity, random):
    order = random.sample(range(len(specs)), len(specs))
    for way in (order, None):
        plan = plan_buckets(specs, capacity, edge_capacity, way)
        check_places(plan, specs, capacity)


def check_places(plan, specs, capacity):
    for dtype, length in plan.lengths.items():
        # Buckets lie side by side in the arena, and gradients do.
        stretches = sorted((b.start, b.stop) for b in plan.buckets if b.dtype == dtype)
        assert [0, *(stop for _, stop in stretches)] == [*(s for s, _ in stretches), length]
        own = sorted(
            (plan.offsets[place], spec.length)
            for place, spec in enumerate(specs)
            if spec.dtype == dtype
        )
        ends = [offset + spec_length for offset, spec_length in own]
        assert [0, *ends] == [*(offset for offset, _ in own), length]
    for bucket in plan.buckets:
        itemsize = specs[bucket.members[0]].itemsize
        assert bucket.length * itemsize <= max(capacity, itemsize)
        assert {specs[member].dtype for member in bucket.members} == {bucket.dtype}
    for place, (offset, spec) in enumerate(zip(plan.offsets, specs, strict=True)):
        holding = [bucket for bucket in plan.buckets if place in bucket.members]
        inside = [min(b.stop, offset + spec.length) - max(b.start, offset) for b in holding]
        assert holding
        assert sum(inside) == spec.length


@given(models(), st.integers(1, 2000), st.randoms())
def test_buckets_come_in_the_order_in_which_they_fill(specs, capacity, random):
    order = random.sample(range(len(specs)), len(specs))
    plan = plan_buckets(specs, capacity, order=order)
    filled_at = [max(order.index(member) for member in b.members) for b in plan.buckets]
    assert filled_at == sorted(filled_at)


def layers(*nbytes):
    return [
        ParameterSpec(f"p{n}", (size // 4,), (1,), "float32", 4) for n, size in enumerate(nbytes)
    ]


def buckets_of(plan):
    return [(bucket.members, 4 * bucket.length) for bucket in plan.buckets]


def test_backward_goes_from_the_last_parameter_to_the_first():
    plan = plan_buckets(layers(400, 800, 400), capacity=800, edge_capacity=800)
    assert buckets_of(plan) == [((2,), 400), ((1,), 800), ((0,), 400)]


def test_the_first_and_the_last_bucket_are_small():
    plan = plan_buckets(layers(400, 400, 4000, 400, 400), capacity=8000, edge_capacity=1000)
    assert buckets_of(plan) == [((4, 3), 800), ((2,), 4000), ((1, 0), 800)]


def test_a_large_parameter_is_cut_in_pieces():
    plan = plan_buckets(layers(100, 9000, 100), capacity=1000, edge_capacity=1000)
    assert buckets_of(plan) == [((2,), 100), *[((1,), 1000)] * 9, ((0,), 100)]


def test_a_large_last_parameter_leaves_a_small_piece_for_the_end():
    plan = plan_buckets(layers(8000), capacity=8000, edge_capacity=1000)
    assert buckets_of(plan) == [((0,), 7000), ((0,), 1000)]


def test_capacities_must_be_positive():
    for capacity, first in ((0, 1), (1, 0), (-5, 1)):
        with pytest.raises(ValueError, match="positive"):
            plan_buckets(layers(100), capacity, first)


@pytest.mark.parametrize(
    "change",
    [{"name": "q"}, {"shape": (3, 2)}, {"strides": (1, 2)}, {"dtype": "float64"}],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_sees_every_difference(change):
    spec = ParameterSpec("p", (2, 3), (3, 1), "float32", 4)
    changed = dataclasses.replace(spec, **change)

    ours, theirs = plan_buckets([spec], 1000), plan_buckets([changed], 1000)

    ours, theirs = describe(ours, [spec], "ring"), describe(theirs, [changed], "ring")
    assert digest(ours) != digest(theirs)
    message = str(first_difference([ours, ours, theirs]))
    assert "on rank 2" in message
    assert "'p: float32[2, 3], strides [3, 1], trained' on rank 0, 1;" in message


def test_odd_ones_are_the_minority():
    assert odd_ones([1, 1, 1]) == []
    assert odd_ones([1, 2, 1]) == [1]
    assert odd_ones([2, 1, 1]) == [0]
    assert odd_ones([1, 2]) == [1]  # rank 0 is taken as right
    assert odd_ones([3, 1, 2, 2]) == [0, 1]
    assert odd_ones([]) == []
