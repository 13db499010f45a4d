"""Arithmetic on host memory: weights are not rounded, 16-bit results once."""

from __future__ import annotations

import pytest
import torch

from mpiddl.buckets.bucket import Bucket, State, spec_of
from mpiddl.buckets.plan import plan_buckets
from mpiddl.devices.host import HostDevice

HOST = HostDevice()
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", [None, 1.0, 0.25, 1 / 3, 0.0])
def test_weighted_sums_round_once(dtype, weight):
    generator = torch.Generator().manual_seed(0)
    partial, incoming = (torch.randn(10_001, generator=generator).to(dtype) for _ in range(2))
    exact = partial.double() * (1.0 if weight is None else weight) + incoming.double()

    HOST.fold("sum", partial, incoming, weight)

    bound = exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 2e-7  # float32 on the way
    assert ((partial.double() - exact).abs() <= bound).all()


def test_weight_zero_forgets_even_nan():
    partial = torch.tensor([float("nan"), float("inf"), 1.0])
    HOST.fold("sum", partial, torch.ones(3), 0.0)
    assert partial.tolist() == [1.0, 1.0, 1.0]
    partial.fill_(float("nan"))
    HOST.scale(partial, 0.0)
    assert partial.tolist() == [0.0, 0.0, 0.0]


def test_integers_do_not_pass_through_floats():
    large = torch.tensor([2**60 + 1])
    HOST.fold("sum", large, torch.tensor([2]), None)
    assert large.item() == 2**60 + 3


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20])
def test_scratch_is_as_long_as_asked_and_used_again(length):
    device = HostDevice()
    with (
        device.scratch(length, torch.float32) as first,
        device.scratch(length, torch.int8) as second,
    ):
        assert (first.dtype, len(first)) == (torch.float32, length)
        assert (second.dtype, len(second)) == (torch.int8, length)
        assert length == 0 or first.data_ptr() != second.data_ptr()
        address = first.data_ptr()
    with device.scratch(length, torch.float32) as again:
        assert again.data_ptr() == address


def test_kept_scratch_is_bounded():
    device = HostDevice()
    for power in range(10, 28):
        with device.scratch(1 << power, torch.uint8):
            pass
    kept = sum(memory.nbytes for stack in device._kept.values() for memory in stack)
    assert kept == device._kept_bytes <= device.KEPT_BYTES


def bucket_of(*parameters):
    specs = [spec_of(f"p{number}", parameter) for number, parameter in enumerate(parameters)]
    plan = plan_buckets(specs, 1 << 20)
    return Bucket(plan.buckets[0], specs, parameters, torch.empty(plan.buckets[0].length))


def test_a_bucket_takes_gradients_wherever_they_are():
    fresh, own, added = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    bucket = bucket_of(fresh, own, added)
    for member, parameter in enumerate((fresh, own, added)):
        parameter.grad = torch.full((2, 3), float(member + 1))
        bucket.take(member)
    view = added.grad
    bucket.reset()
    assert bucket.state is State.FILLING
    assert bucket.missing == {0, 1, 2}

    fresh.grad = torch.full((2, 3), 7.0)  # as after zero_grad(): a tensor of autograd's
    added.grad += 10  # as in a second backward: in place
    own.grad = own.grad.detach()  # the same memory under another name
    for member in range(3):
        bucket.take(member)

    assert added.grad is view
    assert bucket.missing == set()
    assert bucket.buffer.tolist() == [13.0] * 6 + [2.0] * 6 + [7.0] * 6  # last parameter first
    storage = bucket.buffer.untyped_storage().data_ptr()
    assert all(p.grad.untyped_storage().data_ptr() == storage for p in (fresh, own, added))


def test_views_have_the_parameters_strides():
    weight = torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    transposed = torch.nn.Parameter(torch.zeros(5, 2).t())
    bucket = bucket_of(weight, transposed)
    for member, parameter in enumerate((weight, transposed)):
        parameter.grad = torch.rand(parameter.shape)
        want = parameter.grad.clone()
        bucket.take(member)
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, want)


def test_zeros_for_what_is_missing():
    absent, present = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    bucket = bucket_of(absent, present)
    present.grad = torch.tensor([4.0, 5.0])

    bucket.take_zeros()

    assert bucket.buffer.tolist() == [4.0, 5.0, 0.0, 0.0, 0.0]
    assert bucket.missing == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["first", "last", "elsewhere"])
def test_weighted_16_bit_sums_are_rounded_once(dtype, where):
    sources = list(torch.randn(3, 10_001, generator=torch.Generator().manual_seed(0)).to(dtype))
    weights = [1 / 3, 17 / 33, 1e-6]
    wide = [source.double() * weight for source, weight in zip(sources, weights, strict=True)]
    want = (wide[0] + wide[1] + wide[2]).to(dtype).double()
    target = {"first": sources[0], "last": sources[2], "elsewhere": torch.empty_like(sources[0])}
    HostDevice().combine("sum", sources, weights, target[where])

    # float32's own rounding may tip a value that lies between two, hardly ever.
    assert (target[where].double() != want).float().mean() < 1e-3
