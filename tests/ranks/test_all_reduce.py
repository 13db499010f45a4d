"""The heart: every rank ends with the reduction of all, for any length, dtype and op."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import examples
from samples import buffer_of, expected, seeded

import mpiddl
from mpiddl.collectives.channel import MessageChannel
from mpiddl.collectives.choose import ALGORITHMS
from mpiddl.collectives.reduction import DTYPES, FLOATS, Reduction
from mpiddl.devices.host import HOST
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import engine_of

pytestmark = [pytest.mark.layout, pytest.mark.library]

OPS = ("sum", "min", "max", "prod")
MESSAGE_ALGORITHMS = ("ring", "doubling", "direct", "reference")


def run(world, algorithm, buffer, reduction, chunk_bytes):
    channel, device = MessageChannel(world, world.tags.foreground()), device_of(buffer)
    waits = ALGORITHMS[algorithm].run(buffer, reduction, channel, device, chunk_bytes)
    engine_of(world).run(waits, world, device)


@given(
    length=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(OPS),
    algorithm=st.sampled_from(MESSAGE_ALGORITHMS),
    chunk_bytes=st.sampled_from([1, 16, 40, 1000, 1 << 20]),
)
@examples(150)
def test_any_length_dtype_op_and_chunk(world, agree, length, dtype, op, algorithm, chunk_bytes):
    buffer = buffer_of(world.rank, length, dtype)

    run(world, algorithm, buffer, Reduction(op), chunk_bytes)

    want = expected(op, world.size, length, dtype)
    agree(torch.equal(buffer, want), f"{dtype} {op} {length}: {buffer[:9]}, not {want[:9]}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 1000, 700_001])
def test_public_call_reduces_in_place(world, agree, algorithm, dtype, length):
    buffer = buffer_of(world.rank, length, dtype)

    result = mpiddl.all_reduce(buffer, op="sum", algorithm=algorithm)

    agree(result is buffer, "another tensor came back")
    agree(torch.equal(buffer, expected("sum", world.size, length, dtype)), buffer[:9])


@pytest.mark.parametrize("chunk_bytes", [64, 4096, 1 << 18])
def test_many_chunks_in_flight(world, agree, chunk_bytes):
    """Several chunks a segment, with segments of unequal length and a ragged last chunk."""
    length = 20 * chunk_bytes // 4 * world.size + 3
    buffer = buffer_of(world.rank, length, torch.float32)

    run(world, "ring", buffer, Reduction("sum"), chunk_bytes)

    agree(torch.equal(buffer, expected("sum", world.size, length, torch.float32)))


@pytest.mark.parametrize("algorithm", MESSAGE_ALGORITHMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_rank_has_its_own_weight(world, agree, algorithm, dtype):
    """Weights 1/2, 1/4, ... are exact; a rank that weighs 0 contributes nothing, not even NaN."""
    weights = [2.0 ** -(rank + 1) for rank in range(world.size - 1)] + [0.0]
    length = 1001
    buffer = buffer_of(world.rank, length, dtype)
    if world.rank == world.size - 1:
        buffer.fill_(float("nan"))

    run(world, algorithm, buffer, Reduction("sum", weights[world.rank]), 256)

    want = torch.zeros(length, dtype=torch.float64)
    for rank, weight in enumerate(weights[:-1]):
        want += weight * buffer_of(rank, length, torch.float64)
    agree(torch.equal(buffer.double(), want.double()), f"{buffer[:5]}, not {want[:5]}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mean(world, agree, dtype):
    buffer = buffer_of(world.rank, 501, dtype)

    mpiddl.all_reduce(buffer, op="mean")

    want = expected("sum", world.size, 501, torch.float64) / world.size
    error = (buffer.double() - want).abs().max().item()
    bound = 3 * world.size * torch.finfo(dtype).eps
    agree(error <= bound, f"off by {error}, bound {bound}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ring_rounds_16_bit_sums_once_per_hop(world, agree, dtype):
    """|error| <= (n-1) eps/2 times the sum of magnitudes: one rounding at each addition."""
    inputs = [torch.randn(4001, generator=seeded(rank)).to(dtype) for rank in range(world.size)]
    buffer = inputs[world.rank].clone()

    mpiddl.all_reduce(buffer, op="sum", algorithm="ring")

    exact = sum(value.double() for value in inputs)
    magnitudes = sum(value.double().abs() for value in inputs)
    bound = (world.size - 1) * torch.finfo(dtype).eps / 2 * magnitudes * 1.01
    agree(bool(((buffer.double() - exact).abs() <= bound).all()), "rounds too often")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["reference", "direct", "doubling", "shared"])
def test_sums_of_16_bits_are_rounded_once(world, agree, algorithm, dtype):
    """All bits of each value count, so each partial sum of several would be rounded."""
    bits = round(1 / torch.finfo(dtype).eps)
    inputs = [
        ((bits + torch.randint(bits, (4001,), generator=seeded(rank))) / bits).to(dtype)
        for rank in range(world.size)
    ]
    buffer = inputs[world.rank].clone()

    mpiddl.all_reduce(buffer, algorithm=algorithm)

    want = sum(value.double() for value in inputs).to(dtype)
    agree(torch.equal(buffer, want), f"{buffer[:5]}, not {want[:5]}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_on_every_rank(world, agree, algorithm):
    buffer = torch.randn(10_007, generator=seeded(world.rank))

    mpiddl.all_reduce(buffer, algorithm=algorithm)

    digests = mpiddl.gather_json(buffer.cpu().numpy().tobytes().hex()[:4000])
    agree(len(set(digests)) == 1, "bits differ")


@pytest.mark.parametrize("op", ["min", "max", "sum"])
def test_nan_spreads(world, agree, op):
    buffer = torch.ones(world.size)
    buffer[world.rank] = float("nan")

    mpiddl.all_reduce(buffer, op=op, algorithm="ring")

    agree(bool(buffer.isnan().all()), buffer)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int32", "uint8"])
def test_numpy_arrays(world, agree, dtype):
    array = buffer_of(world.rank, 35, torch.int64).cpu().numpy().astype(dtype).reshape(5, 7)

    result = mpiddl.all_reduce(array, op="max")

    want = expected("max", world.size, 35, torch.int64).cpu().numpy().reshape(5, 7)
    agree(result is array and numpy.array_equal(array, want), array)


def test_scalars_and_parameters(world, agree):
    scalar = torch.tensor(world.rank + 1)
    parameter = torch.nn.Parameter(torch.full((3,), float(world.rank)))

    mpiddl.all_reduce(scalar)
    mpiddl.all_reduce(parameter)

    ranks = range(world.size)
    agree(scalar.item() == sum(rank + 1 for rank in ranks), scalar)
    agree(parameter.tolist() == [sum(ranks)] * 3, parameter)


def test_a_slice_leaves_its_surroundings_alone(world, agree):
    whole = torch.ones(100)

    mpiddl.all_reduce(whole[10:90])

    want = torch.ones(100)
    want[10:90] = world.size
    agree(torch.equal(whole, want), whole)


class Watched:
    """A wait that remembers whether the algorithm saw it done."""

    def __init__(self, wait):
        self.wait, self.seen = wait, False

    def done(self):
        self.seen = self.seen or self.wait.done()
        return self.seen


class WatchedChannel(MessageChannel):
    """Keeps count of what is under way: memory that MPI reads or writes."""

    def __init__(self, world, tag):
        super().__init__(world, tag)
        self.sends, self.receives, self.most = [], [], 0

    def send(self, buffer, peer):
        self.sends.append((span(buffer), Watched(super().send(buffer, peer))))
        self.most = max(self.most, len(open_spans(self.sends)))
        return self.sends[-1][1]

    def receive(self, buffer, peer):
        assert not overlaps(buffer, self.sends), "receives into memory that is being sent"
        assert not overlaps(buffer, self.receives), "receives twice into the same memory"
        self.receives.append((span(buffer), Watched(super().receive(buffer, peer))))
        self.most = max(self.most, len(open_spans(self.receives)))
        return self.receives[-1][1]


class WatchedDevice(type(HOST)):
    """Refuses to compute on memory that is under way."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def fold(self, op, partial, incoming, weight):
        assert not overlaps(partial, self.channel.sends), "adds to memory that is being sent"
        assert not overlaps(incoming, self.channel.receives), "adds what has not arrived"
        super().fold(op, partial, incoming, weight)

    def scale(self, buffer, weight):
        assert not overlaps(buffer, self.channel.sends), "scales memory that is being sent"
        super().scale(buffer, weight)


def span(buffer):
    return range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)


def open_spans(messages):
    return [where for where, wait in messages if not wait.seen]


def overlaps(buffer, messages):
    mine = span(buffer)
    return any(
        max(mine.start, other.start) < min(mine.stop, other.stop) for other in open_spans(messages)
    )


@pytest.mark.host
@pytest.mark.parametrize("length", [1, 10, 64, 1000, 5003])
@pytest.mark.parametrize("weight", [None, 0.5])
def test_the_ring_leaves_memory_alone_while_mpi_has_it(world, agree, length, weight):
    channel = WatchedChannel(world, world.tags.foreground())
    buffer = buffer_of(world.rank, length, torch.float32)
    problem = ""
    try:
        waits = ALGORITHMS["ring"].run(
            buffer, Reduction("sum", weight), channel, WatchedDevice(channel), 256
        )
        engine_of(world).run(waits, world)
    except AssertionError as error:
        problem = str(error)

    agree(not problem, problem)
    agree(channel.most <= 4, f"{channel.most} chunks in flight one way")
    want = expected("sum", world.size, length, torch.float32) * (weight or 1)
    agree(torch.equal(buffer, want), buffer[:5])
