"""Bad input: one clear error on every rank, and the buffer stays as it was."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch

import mpiddl
from mpiddl.base.settings import ALGORITHM_NAMES
from mpiddl.errors import MismatchError, MpiddlError, NotInitializedError, UnsupportedBufferError


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


def test_what_is_no_json_is_every_ranks_error(world, agree):
    world.settings = dataclasses.replace(world.settings, check=True)
    try:
        value = object() if world.rank == world.size - 1 else 1
        error = TypeError if world.rank == world.size - 1 else MismatchError
        refused(agree, error, ["JSON serializable"], lambda: mpiddl.gather_json(value))
        refused(
            agree,
            error,
            ["JSON serializable"],
            lambda: mpiddl.broadcast_json(value, world.size - 1),
        )
    finally:
        world.settings = dataclasses.replace(world.settings, check=False)


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
    place = "" if world.device.type == "cpu" else f" on {world.device.type}"
    words = [
        f"broadcast(root={rank}) of float32[2]{place}' on rank {rank}" for rank in range(world.size)
    ]
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
        torch.set_default_device(world.device)
    agree(gathered == list(range(world.size)) and total[0] == world.size)


# The other collectives.


def uneven(world):
    """A length that the ranks cannot share evenly."""
    return 2 * world.size + 1


REFUSED = {
    "all_gather, output too short": (
        lambda w: mpiddl.all_gather(torch.zeros(2 * w.size), torch.ones(3)),
        ["input has 3 elements", "2 of output"],
    ),
    "all_gather, uneven output": (
        lambda w: mpiddl.all_gather(torch.zeros(uneven(w)), torch.ones(2)),
        ["evenly", "lengths=[...]"],
    ),
    "all_gather, lengths for other ranks": (
        lambda w: mpiddl.all_gather(torch.zeros(6), torch.ones(2), lengths=[2] * (w.size + 1)),
        ["one for each rank"],
    ),
    "all_gather, negative length": (
        lambda w: mpiddl.all_gather(
            torch.zeros(2), torch.ones(2), lengths=[-1] + [2] * (w.size - 1)
        ),
        ["lengths=[-1"],
    ),
    "all_gather, lengths that do not add up": (
        lambda w: mpiddl.all_gather(torch.zeros(2), torch.ones(3), lengths=[3] * w.size),
        ["adds up to", "output has 2"],
    ),
    "all_gather, two dtypes": (
        lambda w: mpiddl.all_gather(torch.zeros(w.size, dtype=torch.float64), torch.ones(1)),
        ["output is float64, input float32"],
    ),
    "all_gather, overlap": (
        lambda w: (lambda whole: mpiddl.all_gather(whole[: 2 * w.size], whole[1:3]))(
            torch.zeros(2 * w.size + 2)
        ),
        ["overlap", "copy of the input"],
    ),
    "reduce_scatter, another segment": (
        lambda w: mpiddl.reduce_scatter(torch.zeros(7), torch.ones(2 * w.size)),
        ["output has 7", "segment of"],
    ),
    "reduce_scatter, mean of integers": (
        lambda w: mpiddl.reduce_scatter(
            torch.zeros(1, dtype=torch.int32), torch.ones(w.size, dtype=torch.int32), "mean"
        ),
        ["mean", "op='sum'"],
    ),
    "reduce_scatter, bool": (
        lambda w: mpiddl.reduce_scatter(
            torch.zeros(1, dtype=torch.bool), torch.zeros(w.size, dtype=torch.bool)
        ),
        ["bool", "uint8"],
    ),
    "reduce, no such rank": (lambda w: mpiddl.reduce(torch.ones(2), root=w.size), ["no rank"]),
    "reduce, no such op": (lambda w: mpiddl.reduce(torch.ones(2), "avg"), ["sum, mean"]),
    "gather, no output": (
        lambda w: mpiddl.gather(None, torch.ones(2), root=w.rank),
        ["root", "must pass output, not None"],
    ),
    "gather, no such rank": (
        lambda w: mpiddl.gather(None, torch.ones(2), root=-1),
        ["root -1", "no rank"],
    ),
    "scatter, no input": (
        lambda w: mpiddl.scatter(torch.ones(2), None, root=w.rank),
        ["must pass input, not None"],
    ),
    "scatter, wrong part": (
        lambda w: mpiddl.scatter(torch.ones(3), torch.ones(2 * w.size), root=w.rank),
        ["output has 3 elements", "2 of input"],
    ),
    "all_to_all, overlap": (
        lambda w: (lambda whole: mpiddl.all_to_all(whole, whole))(torch.ones(w.size)),
        ["overlap"],
    ),
    "all_to_all, own part": (
        lambda w: mpiddl.all_to_all(
            torch.zeros(2 * w.size),
            torch.zeros(w.size),
            output_lengths=[2] * w.size,
            input_lengths=[1] * w.size,
        ),
        ["input has 1", "2 of output"],
    ),
    "all_to_all, uneven": (
        lambda w: mpiddl.all_to_all(torch.zeros(uneven(w)), torch.zeros(uneven(w))),
        ["input_lengths=[...]"],
    ),
    "send to oneself": (lambda w: mpiddl.send(torch.ones(1), w.rank), ["another rank"]),
    "receive from no rank": (lambda w: mpiddl.recv(torch.ones(1), w.size), ["another rank"]),
    "scaled integers": (
        lambda w: mpiddl.all_reduce(torch.ones(2, dtype=torch.int64), pre_scale=0.5),
        ["int64", "pre_scale and post_scale"],
    ),
    "a conjugated view": (
        lambda w: mpiddl.broadcast(torch.ones(2, dtype=torch.complex64).conj()),
        ["resolve_conj"],
    ),
    "a negated view": (
        lambda w: mpiddl.all_reduce(torch.ones(1, dtype=torch.complex64).conj().imag),
        ["resolve_neg"],
    ),
    "a reversed array": (
        lambda w: mpiddl.all_reduce(numpy.ones(1)[::-1]),
        ["non-contiguous", "ascontiguousarray"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_other_collectives_refuse(world, agree, case):
    if world.size == 1 and case in ("all_gather, uneven output", "all_to_all, uneven"):
        pytest.skip("one rank shares everything evenly")
    call, words = REFUSED[case]
    refused(agree, ValueError, words, lambda: call(world))
    if case not in ("send to oneself", "receive from no rank"):
        mpiddl.barrier()  # nothing was started


def test_user_tags_out_of_range(world, agree):
    if world.size == 1:
        pytest.skip("nobody to talk to")
    peer = (world.rank + 1) % world.size
    for tag in (-1, 256):
        refused(
            agree, ValueError, [str(tag)], lambda tag=tag: mpiddl.send(torch.ones(1), peer, tag)
        )


def test_a_message_of_another_length_or_dtype(world, agree):
    if world.size == 1:
        pytest.skip("nobody to talk to")
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    with world.split(0) as group:  # its messages are lost with it
        sent = torch.ones(4)
        work = mpiddl.send(sent, right, async_=True, world=group)
        words = [f"rank {left} sent float32[4]", "receives float64[4]", "by tag"]
        target = torch.zeros(4, dtype=torch.float64)
        refused(agree, MismatchError, words, lambda: mpiddl.recv(target, left, world=group))
        work.wait()


def test_an_inference_tensor_outside_inference_mode(world, agree):
    with torch.inference_mode():
        tensor = torch.ones(3)
    words = ["inference_mode()", "clone()"]
    refused(agree, UnsupportedBufferError, words, lambda: mpiddl.all_reduce(tensor))
    mpiddl.broadcast(tensor)  # moves bytes only
    with torch.inference_mode():
        mpiddl.all_reduce(tensor)
    agree(tensor.tolist() == [world.size] * 3, tensor)


def on_one(world, usual, odd):
    """``odd`` on the last rank."""
    return odd if world.rank == world.size - 1 else usual


MISMATCHES = {
    "reduce to two roots": lambda w: mpiddl.reduce(torch.ones(3), root=on_one(w, 0, 1), check=True),
    "reduce_scatter of two ops": lambda w: mpiddl.reduce_scatter(
        torch.ones(1), torch.ones(w.size), on_one(w, "sum", "max"), check=True
    ),
    "all_gather of two lengths": lambda w: mpiddl.all_gather(
        torch.ones(on_one(w, 3, 4) * w.size), torch.ones(on_one(w, 3, 4)), check=True
    ),
    "gather of two dtypes": lambda w: mpiddl.gather(
        torch.ones(3 * w.size, dtype=on_one(w, torch.float32, torch.int32)),
        torch.ones(3, dtype=on_one(w, torch.float32, torch.int32)),
        check=True,
    ),
    "gather and scatter": lambda w: on_one(w, mpiddl.gather, mpiddl.scatter)(
        torch.ones(on_one(w, 3 * w.size, 3)), torch.ones(on_one(w, 3, 3 * w.size)), check=True
    ),
    "other lists of lengths": lambda w: mpiddl.all_gather(
        torch.ones(w.size + 1),
        torch.ones(1),
        lengths=on_one(w, [2] + [1] * (w.size - 1), [1] * (w.size - 1) + [2]),
        check=True,
    ),
    "barrier and broadcast": lambda w: on_one(
        w, mpiddl.barrier, lambda **rest: mpiddl.broadcast(torch.ones(2), **rest)
    )(check=True),
    "scaled here only": lambda w: mpiddl.all_reduce(
        torch.ones(2), pre_scale=on_one(w, None, 0.5), check=True
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_check_compares_every_collective(world, agree, case):
    if world.size == 1:
        pytest.skip("one rank cannot disagree")
    refused(agree, ValueError, ["rank"], lambda: MISMATCHES[case](world))
    mpiddl.barrier()


def test_check_finds_a_rank_that_sends_more_than_is_expected(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot disagree")
    lengths = [1] * world.size
    outgoing = [on_one(world, 1, 5), *lengths[1:]]  # the last rank sends 5 to rank 0
    words = [f"rank {world.size - 1} sends 5 elements to rank 0, which expects 1"]

    def call():
        mpiddl.all_to_all(
            torch.zeros(world.size),
            torch.zeros(sum(outgoing)),
            output_lengths=lengths,
            input_lengths=outgoing,
            check=True,
        )

    refused(agree, MismatchError, words, call)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("root", lambda w: mpiddl.broadcast(torch.ones(2), root=0.0)),
        ("root", lambda w: mpiddl.reduce(torch.ones(2), root="0")),
        ("root", lambda w: mpiddl.gather_json(1, root=0.0)),
        ("lengths", lambda w: mpiddl.all_gather(torch.ones(w.size), torch.ones(1), lengths=[1.0])),
        ("peer", lambda w: mpiddl.send(torch.ones(2), w.rank + 0.5)),
        ("tag", lambda w: mpiddl.recv(torch.ones(2), (w.rank + 1) % w.size, tag=1.5)),
        ("color", lambda w: w.split(1.5)),
        ("key", lambda w: w.split(0, key=0.5)),
        ("shape", lambda w: mpiddl.empty((2, 1.5))),
    ],
)
def test_numbers_that_are_no_integers(world, agree, name, call):
    """MPI's Python bindings cut off what is behind the point."""
    if world.size == 1 and name == "tag":
        pytest.skip("nobody to receive from")
    refused(agree, TypeError, [name, "integer"], lambda: call(world))


def test_integers_of_numpy_are_integers(world, agree):
    zero, right, left = numpy.int64([0, (world.rank + 1) % world.size, world.rank - 1])
    tensor = torch.full((2,), float(world.rank))
    for call in (mpiddl.broadcast, mpiddl.reduce):
        call(tensor, root=zero)
    agree(mpiddl.broadcast_json(world.rank, root=zero) == 0)
    agree(mpiddl.gather_json(world.rank, root=zero) == [None, [*range(world.size)]][not world.rank])
    mpiddl.gather(torch.empty(2 * world.size), tensor, root=zero)
    mpiddl.scatter(tensor, torch.zeros(2 * world.size), root=zero)
    if world.size > 1:
        work = mpiddl.send(tensor, right, numpy.int8(3), async_=True)
        mpiddl.recv(torch.empty(2), left % world.size, numpy.int8(3))
        work.wait()
    with world.split(zero, key=right) as group:
        agree(group.size == world.size)
    agree(bool((tensor == 0).all()))
