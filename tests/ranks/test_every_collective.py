"""Every collective, on any dtype, op, length and group, early and late: the oracle's result."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cases import MOVED_ONLY, MOVES, NAMES, Case
from delays import delayed
from hypothesis import given
from hypothesis import strategies as st
from matrix import examples, seeds
from samples import buffer_of, seeded

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS
from mpiddl.collectives.reduction import DTYPES, FLOATS

pytestmark = [pytest.mark.layout, pytest.mark.library, pytest.mark.device]

OPS = ("sum", "min", "max", "prod")


@pytest.fixture(scope="module")
def groups(world):
    """Worlds to run in; None where this rank is not in the group."""
    tiny = world.split(0)
    # Chunks of a few elements: several of them even in short buffers.
    tiny.settings = dataclasses.replace(world.settings, chunk_size=24)
    far = world.split(0)
    far.reach = None  # as where the system forbids a rank to read another's memory
    made = {
        "world": world,
        "tiny chunks": tiny,
        "out of reach": far,
        "reversed": world.split(0, key=-world.rank),
        "halves": world.split(world.rank % 2),
        "all but the first": world.split(None if world.rank == 0 else 0),
        "alone": world.split(world.rank),
    }
    yield made
    for name, group in made.items():
        if group is not None and name != "world":
            group.close()


GROUPS = (
    "world",
    "tiny chunks",
    "out of reach",
    "reversed",
    "halves",
    "all but the first",
    "alone",
)


@given(
    name=st.sampled_from(NAMES),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(OPS),
    length=st.integers(0, 60),
    seed=st.integers(0, 999),
    numpy=st.booleans(),
    async_=st.booleans(),
)
@examples(400)
def test_any_collective(agree, groups, name, group, dtype, op, length, seed, numpy, async_):
    problem = ""
    if groups[group] is not None:
        case = Case(name, groups[group], seed, dtype, op, length, numpy)
        result = case.start(async_=async_)
        if async_:
            result.wait()
        problem = case.problem()
    agree(not problem, f"{group}: {problem}")


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("dtype", MOVED_ONLY, ids=str)
def test_any_dtype_moves(world, agree, name, dtype):
    for seed in range(3):
        case = Case(name, world, seed, dtype, length=7)
        case.start()
        agree(not case.problem(), case.problem())


@pytest.mark.parametrize("name", NAMES)
def test_larger_than_a_chunk(world, agree, name):
    case = Case(name, world, 1, torch.float32, length=400_003)
    case.start()
    agree(not case.problem(), case.problem())


@given(seed=st.integers(0, 10_000))
@examples(25)
def test_all_at_once_and_each_rank_late_in_its_own_way(world, agree, groups, seed):
    """Every collective is in flight at once; works are waited for in another order on each rank."""
    drawn = random.Random(seed)
    names = drawn.sample(NAMES, len(NAMES)) + drawn.choices(NAMES, k=6)
    own = random.Random(f"{seed} {world.rank}")
    problems = []
    with delayed(world, seed):
        cases, works = [], []
        for number, name in enumerate(names):
            group = groups[drawn.choice(GROUPS)]
            dtype, length = drawn.choice(DTYPES), drawn.choice([0, 1, 30, 3000])
            if group is not None:
                cases.append(Case(name, group, f"{seed} {number}", dtype, length=length))
                works.append(cases[-1].start(async_=True))
        for work in own.sample(works, len(works)):
            work.wait()
        problems = [case.problem() for case in cases if case.problem()]
    agree(not problems, problems)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", seeds(4))
def test_algorithms_whose_ranks_are_late(world, agree, groups, algorithm, seed):
    """Several at once, small and large, in a world of large chunks and in one of tiny ones."""
    lengths = [0, 1, 5, 300, 5000, 20_000]
    with delayed(world, seed):
        cases = [
            Case("all_reduce", groups[group], seed, dtype, length=length)
            for group in ("world", "tiny chunks")
            for dtype in (torch.float32, torch.int64)
            for length in (lengths if group == "world" else lengths[:4])
        ]
        works = [case.start(algorithm=algorithm, async_=True) for case in cases]
        random.Random(f"{seed} {world.rank}").shuffle(works)
        for work in works:
            work.wait()
    problems = [case.problem() for case in cases if case.problem()]
    agree(not problems, problems)


def memory_of(kind, world, length, dtype):
    """In a window on every rank, on none, or on some."""
    window = mpiddl.empty(length + 3, dtype, world=world)[3:]  # not at its start
    private = torch.empty(length, dtype=dtype)
    return private if kind == "private" or (kind == "mixed" and world.rank % 2) else window


@pytest.mark.parametrize("kind", ["window", "private", "mixed"])
@pytest.mark.parametrize("group", ["world", "out of reach", "reversed"])
def test_shared_all_reduce_wherever_the_buffers_are(world, agree, groups, group, kind):
    """Around the largest small buffer, one piece, and what a lane can show at once."""
    group = groups[group]
    if group.num_nodes > 1:
        pytest.skip("works within one node")
    with delayed(world, f"{group} {kind}"):
        for dtype, length in [
            (torch.int64, 2048),
            (torch.int64, 2049),
            (torch.float32, 5000),
            (torch.int16, 300_000),
            (torch.float32, 700_001),
        ]:
            buffers = [memory_of(kind, group, length, dtype) for _ in range(3)]
            works = []
            for number, buffer in enumerate(buffers):
                buffer.copy_(buffer_of(group.rank + number, length, dtype))
                works.append(
                    mpiddl.all_reduce(buffer, algorithm="shared", async_=True, world=group)
                )
            random.Random(f"{length} {world.rank}").shuffle(works)
            for work in works:
                work.wait()
            for number, buffer in enumerate(buffers):
                ranks = range(number, number + group.size)
                want = sum(buffer_of(rank, length, dtype) for rank in ranks)
                agree(torch.equal(buffer, want), f"{dtype} {length}: {buffer[:5]}, not {want[:5]}")


@pytest.mark.parametrize("name", ["all_gather", "gather", "scatter", "reduce_scatter"])
def test_a_rank_may_pass_its_own_part(world, agree, name):
    """What is there already is not copied, and what belongs to others is not touched early."""
    size, rank = world.size, world.rank
    parts = [torch.arange(3.0) + 10 * peer for peer in range(size)]
    mine = slice(3 * rank, 3 * rank + 3)
    if name == "scatter":
        whole = torch.cat(parts)
        own = whole[:3] if rank == 0 else torch.zeros(3)
        mpiddl.scatter(own, whole if rank == 0 else None)
        want = parts[rank]
    elif name == "reduce_scatter":
        whole = torch.cat(parts)
        own = mpiddl.reduce_scatter(whole[mine], whole)
        want = parts[rank] * size
    else:
        whole = torch.full((3 * size,), -1.0)
        whole[mine] = parts[rank]
        if name == "all_gather":
            mpiddl.all_gather(whole, whole[mine])
        else:
            mpiddl.gather(whole if rank == 0 else None, whole[mine])
        own = whole if rank == 0 or name == "all_gather" else whole[mine]
        want = torch.cat(parts) if rank == 0 or name == "all_gather" else parts[rank]
    agree(torch.equal(own, want), f"{own}, not {want}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "ring", "doubling", "direct", "reference"])
@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_scales_before_and_after(world, agree, dtype, algorithm, op):
    """Powers of two: scaling by them is exact. Each rank has a weight of its own."""
    buffers = [torch.arange(1.0, 20.0).to(dtype) for _ in range(world.size)]
    weights = [2.0**-rank for rank in range(world.size)]
    mine = buffers[world.rank].clone()

    mpiddl.all_reduce(mine, op, algorithm=algorithm, pre_scale=weights[world.rank], post_scale=4.0)

    scaled = torch.stack([b.double() * w for b, w in zip(buffers, weights, strict=True)])
    total = {"sum": scaled.sum(0), "mean": scaled.mean(0), "max": scaled.amax(0)}[op] * 4
    error = ((mine.double() - total) / total).abs().max().item()
    agree(error <= world.size * torch.finfo(dtype).eps, f"off by {error}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reduce_and_reduce_scatter_round_16_bits_once(world, agree, dtype):
    """The same bits as an addition in float32 (float64), in rank order, rounded at the end."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    inputs = [torch.randn(1001, generator=seeded(rank)).to(dtype) for rank in range(world.size)]
    want = inputs[0].to(wide)
    for other in inputs[1:]:
        want = want + other.to(wide)
    want = want.to(dtype)
    reduced = inputs[world.rank].clone()
    segments = [len(part) for part in want.tensor_split(world.size)]
    segment = torch.zeros(segments[world.rank], dtype=dtype)

    mpiddl.reduce(reduced, root=world.size - 1)
    mpiddl.reduce_scatter(segment, inputs[world.rank])

    last = world.rank == world.size - 1
    agree(torch.equal(reduced, want if last else inputs[world.rank]), "reduce")
    agree(torch.equal(segment, want.tensor_split(world.size)[world.rank]), "reduce_scatter")


@pytest.mark.parametrize("length", [0, 1, 1000, 300_001])
def test_messages_round_the_ranks(world, agree, length):
    if world.size == 1:
        pytest.skip("nobody to talk to")
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    outgoing = [torch.full((length,), 10.0 * tag + world.rank) for tag in range(3)]
    incoming = [torch.zeros(length) for _ in range(3)]

    # Tags tell them apart, whatever the order of receives.
    works = [mpiddl.send(outgoing[tag], right, tag, async_=True) for tag in range(3)]
    for tag in (2, 0, 1):
        result = mpiddl.recv(incoming[tag], left, tag)
        agree(result is incoming[tag])
    for work in works:
        work.wait()

    for tag in range(3):
        agree(torch.equal(incoming[tag], torch.full((length,), 10.0 * tag + left)), tag)


def test_messages_of_one_tag_keep_their_order(world, agree):
    if world.size == 1:
        pytest.skip("nobody to talk to")
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    sends = [mpiddl.send(torch.tensor([n, world.rank]), right, async_=True) for n in range(40)]
    got = [torch.zeros(2, dtype=torch.int64) for _ in range(40)]
    receives = [mpiddl.recv(message, left, async_=True) for message in got]
    order = random.Random(world.rank).sample(sends + receives, 80)
    for work in order:
        work.wait()

    agree([message.tolist() for message in got] == [[n, left] for n in range(40)], got[:3])
