"""Arithmetic on host memory: weights are not rounded, 16-bit results once."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["first", "last", "elsewhere"])
def test_weighted_16_bit_sums_are_rounded_once(dtype, where):
    sources = list(torch.randn(3, 10_001, generator=torch.Generator().manual_seed(0)).to(dtype))
    weights = [1 / 3, 17 / 33, 1e-6]
    wide = [source.double() * weight for source, weight in zip(sources, weights, strict=True)]
    want = (wide[0] + wide[1] + wide[2]).to(dtype).double()
    target = {"first": sources[0], "last": sources[2], "elsewhere": torch.empty_like(sources[0])}
    HostDevice().combine("sum", sources, weights, [target[where]])

    # float32's own rounding may tip a value that lies between two, hardly ever.
    assert (target[where].double() != want).float().mean() < 1e-3
