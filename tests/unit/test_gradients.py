"""Gradients as views of arenas."""

from __future__ import annotations

import pytest
import torch

from mpiddl.errors import GradientError
from mpiddl.gradients.arena import Gradients, spec_of
from mpiddl.gradients.bucket import State
from mpiddl.gradients.plan import plan_buckets


def gradients_of(*parameters, capacity=1 << 20):
    specs = [spec_of(f"p{number}", parameter) for number, parameter in enumerate(parameters)]
    plan = plan_buckets(specs, capacity)
    arenas = {
        dtype: torch.empty(length, dtype=getattr(torch, dtype))
        for dtype, length in plan.lengths.items()
    }
    return Gradients(plan, parameters, arenas)


def parameters(*shapes):
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]


@pytest.mark.parametrize("shape", [(2, 3), (100, 60)])  # brought in with others, and alone
def test_gradients_are_taken_wherever_they_are(shape):
    fresh, own, added = parameters(shape, shape, shape)
    gradients = gradients_of(fresh, own, added)
    (bucket,) = gradients.buckets
    for member, parameter in enumerate((fresh, own, added)):
        parameter.grad = torch.full(shape, float(member + 1))
        assert list(gradients.take(member)) == [bucket]
    gradients.fill(bucket)
    view = added.grad
    bucket.reset()
    assert bucket.state is State.FILLING
    assert bucket.num_missing == 3

    fresh.grad = torch.full(shape, 7.0)  # as after zero_grad(): a tensor of autograd's
    added.grad += 10  # as in a second backward: in place
    own.grad = own.grad.detach()  # the same memory under another name
    for member in range(3):
        list(gradients.take(member))
    gradients.fill(bucket)

    assert added.grad is view
    length = fresh.numel()  # last parameter first
    assert bucket.buffer.tolist() == [13.0] * length + [2.0] * length + [7.0] * length
    storage = bucket.buffer.untyped_storage().data_ptr()
    assert all(p.grad.untyped_storage().data_ptr() == storage for p in (fresh, own, added))


@pytest.mark.parametrize("shape", [(2, 3), (100, 60)])
def test_gradients_lose_their_graph(shape):
    (parameter,) = parameters(shape)
    gradients = gradients_of(parameter)
    parameter.grad = torch.ones(shape, requires_grad=True) * 2  # as with create_graph=True
    (bucket,) = gradients.take(0)
    gradients.fill(bucket)
    assert not parameter.grad.requires_grad
    assert torch.equal(parameter.grad, torch.full(shape, 2.0))


def test_a_gradient_that_a_hook_takes_away_is_missed():
    (small,) = parameters((2, 3))
    gradients = gradients_of(small)
    small.grad = torch.ones(2, 3)
    (bucket,) = gradients.take(0)
    small.grad = None
    with pytest.raises(GradientError, match="'p0' was set to None"):
        gradients.fill(bucket)


def test_a_large_gradient_in_another_order_of_memory():
    (large,) = parameters((5, 8))
    gradients = gradients_of(large, capacity=64)
    large.grad = torch.arange(40.0).view(8, 5).t()
    assert list(gradients.take(0)) == gradients.buckets
    assert large.grad is gradients.views[0]
    assert torch.equal(large.grad, torch.arange(40.0).view(8, 5).t())


def test_a_large_gradient_comes_piece_by_piece():
    (large,) = parameters((5, 8))
    gradients = gradients_of(large, capacity=64)
    large.grad = torch.arange(40.0).view(5, 8)
    assert [len(bucket.buffer) for bucket in gradients.buckets] == [14, 13, 13]

    for number, bucket in enumerate(gradients.take(0)):
        assert bucket is gradients.buckets[number]
        start = sum(len(earlier.buffer) for earlier in gradients.buckets[:number])
        assert bucket.buffer.tolist() == [float(start + k) for k in range(len(bucket.buffer))]

    assert large.grad is gradients.views[0]
    assert torch.equal(large.grad, torch.arange(40.0).view(5, 8))


@pytest.mark.parametrize("capacity", [16, 1 << 20])
def test_views_have_the_parameters_strides(capacity):
    weight = torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    transposed = torch.nn.Parameter(torch.zeros(5, 2).t())
    gradients = gradients_of(weight, transposed, capacity=capacity)
    for make in (torch.rand, torch.rand_like):  # contiguous, and as the parameter is
        given = [make(p.shape) if make is torch.rand else make(p) for p in (weight, transposed)]
        for parameter, gradient in zip((weight, transposed), given, strict=True):
            parameter.grad = gradient.detach().clone()
        for member in (0, 1):
            list(gradients.take(member))
        for bucket in gradients.buckets:
            gradients.fill(bucket)
        for parameter, gradient in zip((weight, transposed), given, strict=True):
            assert parameter.grad.stride() == parameter.stride()
            assert torch.equal(parameter.grad, gradient)


def test_nothing_counts_as_zero():
    absent, present = parameters(3, 2)
    gradients = gradients_of(absent, present)
    present.grad = torch.tensor([4.0, 5.0])

    for member in (0, 1):
        list(gradients.take_nothing(member))
    gradients.fill(gradients.buckets[0])

    assert gradients.buckets[0].buffer.tolist() == [4.0, 5.0, 0.0, 0.0, 0.0]


def test_gradients_outlive_the_layout():
    first, second = parameters(3, 2)
    gradients = gradients_of(first, second)
    first.grad = torch.tensor([1.0, 2.0, 3.0])
    list(gradients.take_nothing(0))
    list(gradients.take_nothing(1))
    gradients.fill(gradients.buckets[0])
    second.grad = None
    gradients.release()
    gradients.buckets[0].buffer.zero_()

    assert first.grad.tolist() == [1.0, 2.0, 3.0]
    assert second.grad is None
