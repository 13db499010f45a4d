"""CuPy's arrays, on its streams and torch's."""

from __future__ import annotations

import numpy
import pytest
import torch
from slow import CYCLES

import mpiddl
from mpiddl.errors import UnsupportedBufferError

DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")


@pytest.fixture
def cupy(world):
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(world.device.index):
        yield cupy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 1000, 300_001])
def test_all_reduce_in_place(world, agree, cupy, dtype, length):
    array = ((cupy.arange(length) + world.rank) % 5).astype(dtype)

    result = mpiddl.all_reduce(array)

    want = sum((numpy.arange(length) + rank) % 5 for rank in range(world.size)).astype(dtype)
    agree(result is array, "another array came back")
    agree(numpy.array_equal(cupy.asnumpy(array), want), array[:5])


def test_on_a_stream_of_cupys(world, agree, cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    for turn in range(10):
        with stream:
            array = cupy.full(100_000, 77, dtype="float32")
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
                torch.cuda._sleep(CYCLES)
            array.fill(world.rank + 1)
            mpiddl.all_reduce(array)
            copy = array * 2
            got = cupy.asnumpy(copy, stream=stream)
            stream.synchronize()
        agree(bool((got == world.size * (world.size + 1)).all()), f"{turn}: {got[:5]}")


def test_shapes_and_other_collectives(world, agree, cupy):
    array = cupy.full((3, 4), world.rank, dtype="float32")
    mpiddl.broadcast(array, root=world.size - 1)
    agree(array.shape == (3, 4) and bool((array == world.size - 1).all()), array)
    whole, mine = cupy.zeros(2 * world.size), cupy.full(2, float(world.rank))
    mpiddl.all_gather(whole, mine)
    agree(cupy.asnumpy(whole).tolist() == [r for r in range(world.size) for _ in range(2)], whole)
    work = mpiddl.all_reduce(mine, async_=True)
    agree(work.wait() is mine and float(mine[0]) == sum(range(world.size)), mine)


def test_what_is_refused(world, agree, cupy):
    for array, words in [
        (cupy.ones((4, 6)).T, "ascontiguousarray"),
        (cupy.ones(3, dtype="complex64"), "cannot be reduced"),
        (cupy.ones(3, dtype=bool), "cannot be reduced"),
    ]:
        with pytest.raises(UnsupportedBufferError, match=words):
            mpiddl.all_reduce(array)
    agree(True)
