"""Norms of gradients, without MPI."""

from __future__ import annotations

import math

import pytest
import torch

import mpiddl
from mpiddl.errors import GradientError
from mpiddl.training.clipping import PIECE

INF = math.inf


def parameters_of(*gradients):
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def some(dtype=torch.float32):
    """Below, at and above the length of a piece, in several shapes and strides."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3,), (), (PIECE,), (PIECE + 1,), (3, PIECE), (2, 3, 40, 50), (0,), (2 * PIECE - 1,)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*made, made[4].t(), made[5].to(memory_format=torch.channels_last), made[5][:, :1]]


def exact(gradients, p):
    flat = torch.cat([gradient.detach().double().flatten() for gradient in gradients])
    return torch.linalg.vector_norm(flat, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [1, 2, 3.5, INF])
def test_the_norm_is_exact_but_for_rounding(dtype, p):
    gradients = some(dtype)
    want = exact(gradients, p)
    before = [gradient.clone() for gradient in gradients]

    got = mpiddl.clip_grad_norm_(parameters_of(*gradients), 1e30, p)

    assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert got.item() == pytest.approx(want.item(), rel=3e-7)
    assert all(map(torch.equal, gradients, before))  # not even scaled by 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_scaled_as_torch_does(dtype):
    ours, theirs = some(dtype)[:-3], some(dtype)[:-3]
    want = exact(ours, 2)
    mpiddl.clip_grad_norm_(parameters_of(*ours), 0.5)
    for gradient in theirs:
        gradient.mul_(0.5 / want.item())
    assert all(torch.allclose(a, b, rtol=2**-7) for a, b in zip(ours, theirs, strict=True))
    assert exact(ours, 2).item() == pytest.approx(0.5, rel=1e-3)


def test_a_large_gradient_loses_no_digits():
    """torch's is 4e-4 off (2.13.0, one tensor of 1e7)."""
    gradient = torch.full((10_000_000,), 0.1)
    norm = mpiddl.clip_grad_norm_(parameters_of(gradient), 1e30)
    assert norm.item() == pytest.approx(exact([gradient], 2).item(), rel=1e-7)


def test_the_bits_depend_neither_on_threads_nor_on_where_memory_is():
    whole = torch.randn(300_001, generator=torch.Generator().manual_seed(2))
    before, norms = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for start in (0, 1, 7):
                gradient = torch.empty(300_001 + start)[start:].copy_(whole)
                norms.add(mpiddl.clip_grad_norm_(parameters_of(gradient), 1e30).item())
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_may_leave_float32(scale):
    gradient = torch.full((100,), scale)
    norm = mpiddl.clip_grad_norm_(parameters_of(gradient), 1e38)
    assert norm.item() == pytest.approx(10 * scale, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_what_is_not_finite(bad):
    gradient = torch.ones(2 * PIECE)
    gradient[PIECE] = bad
    parameters = parameters_of(gradient, torch.ones(2))
    with pytest.raises(GradientError, match="nan_check"):
        mpiddl.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert parameters[1].grad.tolist() == [1, 1]
    assert not torch.isfinite(mpiddl.clip_grad_norm_(parameters, 1.0))
    assert parameters[1].grad.isnan().all() or parameters[1].grad.eq(0).all()


def test_other_gradients():
    indices, values = torch.tensor([[0, 2, 0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]])
    sparse = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=True)
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    parameter.grad = sparse
    assert mpiddl.clip_grad_norm_(parameter, 5.0).item() == pytest.approx(50**0.5)
    assert parameter.grad.to_dense().norm().item() == pytest.approx(5.0)
    imaginary = parameters_of(torch.tensor([3 + 4j, 0]))
    assert mpiddl.clip_grad_norm_(imaginary, 1.0).item() == pytest.approx(5.0)
    assert mpiddl.clip_grad_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0
    with pytest.raises(ValueError, match="norm_type=0"):
        mpiddl.clip_grad_norm_([], 1.0, 0)
