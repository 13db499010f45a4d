"""Bad input: one clear error on every rank, and the buffer stays as it was."""

from __future__ import annotations

import numpy
import pytest
import torch

import mpiddl
from mpiddl.errors import MismatchError, MpiddlError, NotInitializedError, UnsupportedBufferError
from mpiddl.settings import ALGORITHM_NAMES


def refused(agree, error, words, call, buffer=None):
    """``call`` raises ``error`` with all ``words`` in it, and leaves ``buffer`` alone."""
    before = None if buffer is None else buffer.clone()
    try:
        call()
    except error as caught:
        message = str(caught)
    else:
        message = ""
    agree(message, f"no {error.__name__}")
    missing = [word for word in words if word not in message]
    agree(not missing, f"{missing} not in {message!r}")
    agree(before is None or torch.equal(before, buffer), "the buffer was changed")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.ones(4, 6).t(), ["non-contiguous", "contiguous()"]),
        (lambda: torch.ones(8)[::2], ["non-contiguous"]),
        (lambda: torch.ones(1).expand(5), ["non-contiguous"]),
        (lambda: torch.ones(3, dtype=torch.complex64), ["complex64", "float32"]),
        (lambda: torch.ones(3, dtype=torch.bool), ["bool", "uint8"]),
        (lambda: torch.eye(3).to_sparse(), ["sparse", "to_dense"]),
        (lambda: torch.ones(3, device="meta"), ["meta", "host memory"]),
    ],
    ids=["transposed", "strided", "expanded", "complex", "bool", "sparse", "meta"],
)
def test_tensors_that_cannot_be_reduced(world, agree, make, words):
    refused(agree, UnsupportedBufferError, words, lambda: mpiddl.all_reduce(make()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: numpy.ones((4, 6)).T, ["non-contiguous", "ascontiguousarray"]),
        (lambda: numpy.array(["a"]), ["<U1"]),
        (lambda: numpy.ones(3, dtype=">f4"), [">f4", "float32"]),
        (lambda: numpy.frombuffer(b"12345678"), ["read-only"]),
    ],
    ids=["transposed", "text", "big-endian", "read-only"],
)
def test_arrays_that_cannot_be_reduced(world, agree, make, words):
    refused(agree, UnsupportedBufferError, words, lambda: mpiddl.all_reduce(make()))


@pytest.mark.parametrize("value", [[1, 2], 3.0, None, b"bytes"])
def test_neither_tensor_nor_array(world, agree, value):
    refused(agree, TypeError, [type(value).__name__], lambda: mpiddl.all_reduce(value))


def test_unknown_names_list_the_valid_ones(world, agree):
    ones = torch.ones(3)
    words = ["average", "sum, mean, min, max, prod"]
    refused(agree, ValueError, words, lambda: mpiddl.all_reduce(ones, op="average"), ones)
    words = ["tree", ", ".join(ALGORITHM_NAMES)]
    refused(agree, ValueError, words, lambda: mpiddl.all_reduce(ones, algorithm="tree"), ones)


def test_what_an_algorithm_or_op_cannot_do(world, agree):
    halves, integers = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.int32)
    refused(
        agree,
        UnsupportedBufferError,
        ["library", "bfloat16", "float32"],
        lambda: mpiddl.all_reduce(halves, algorithm="library"),
        halves,
    )
    refused(
        agree,
        UnsupportedBufferError,
        ["mean", "int32", "op='sum'"],
        lambda: mpiddl.all_reduce(integers, op="mean"),
        integers,
    )


def test_broadcast_from_no_rank(world, agree):
    ones = torch.ones(3)
    for root in (-1, world.size):
        words = [str(root), str(world.size)]
        refused(agree, ValueError, words, lambda root=root: mpiddl.broadcast(ones, root), ones)


def on_last(world, usual, odd):
    return odd if world.rank == world.size - 1 else usual


@pytest.mark.parametrize(
    ("usual", "odd", "words"),
    [
        (torch.ones(4), torch.ones(5), ["float32[4]", "float32[5]"]),
        (torch.ones(4), torch.ones(2, 2), ["float32[4]", "float32[2, 2]"]),
        (torch.ones(4), torch.ones(4).double(), ["float32[4]", "float64[4]"]),
    ],
    ids=["length", "shape", "dtype"],
)
def test_mismatch_names_ranks_and_shapes(world, agree, usual, odd, words):
    if world.size == 1:
        pytest.skip("one rank cannot disagree")
    buffer = on_last(world, usual, odd).clone()
    words = [f"rank {world.size - 1}", *words]
    refused(agree, MismatchError, words, lambda: mpiddl.all_reduce(buffer, check=True), buffer)


def test_mismatch_of_op_algorithm_root_and_collective(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot disagree")
    ones = torch.ones(3)
    for calls in (
        [lambda: mpiddl.all_reduce(ones, op=on_last(world, "sum", "max"), check=True)],
        [lambda: mpiddl.all_reduce(ones, algorithm=on_last(world, "ring", "auto"), check=True)],
        [lambda: mpiddl.broadcast(ones, root=on_last(world, 0, 1), check=True)],
        [
            lambda: mpiddl.broadcast(ones, check=True),
            lambda: mpiddl.all_reduce(ones, check=True),
        ],
    ):
        call = on_last(world, calls[0], calls[-1])
        refused(agree, MismatchError, [f"rank {world.size - 1}"], call, ones)


def test_one_ranks_bad_buffer_is_every_ranks_error(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot disagree")
    buffer = on_last(world, torch.ones(4), torch.ones(4, dtype=torch.bool))
    refused(agree, ValueError, ["bool"], lambda: mpiddl.all_reduce(buffer, check=True), buffer)


def test_check_lets_the_right_call_pass(world, agree):
    ones = torch.ones(3)

    mpiddl.all_reduce(ones, check=True)

    agree(ones.tolist() == [world.size] * 3, ones)


def test_a_closed_world_is_refused(world, agree):
    part = world.split(0)
    part.close()
    part.close()  # idempotent
    words = ["closed", "mpiddl.init()"]
    refused(agree, NotInitializedError, words, lambda: mpiddl.barrier(world=part))


def test_roots_that_are_no_rank(world, agree):
    words = [str(world.size)]
    refused(agree, ValueError, words, lambda: mpiddl.broadcast_json(1, root=world.size))
    refused(agree, ValueError, words, lambda: mpiddl.gather_json(1, root=-1))


def test_each_odd_rank_is_shown_with_its_own_call(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot disagree")
    ones = torch.ones(2)
    words = [f"broadcast(root={rank}) of float32[2]' on rank {rank}" for rank in range(world.size)]
    refused(agree, MismatchError, words, lambda: mpiddl.broadcast(ones, world.rank, check=True))


def test_no_tags_left_says_what_to_do(world, agree):
    refused(agree, MpiddlError, ["bucket_size", "unwrap"], lambda: world.tags.keep(40_000))


def test_the_default_device_is_not_used_inside(world, agree):
    torch.set_default_device("meta")
    try:
        gathered = mpiddl.gather_json(world.rank)
        mpiddl.barrier()
        total = mpiddl.all_reduce(numpy.ones(3))
    finally:
        torch.set_default_device("cpu")
    agree(gathered == list(range(world.size)) and total[0] == world.size)
