"""Clipping by a norm that depends on the gradients alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch

from mpiddl.base.plain import gapless
from mpiddl.errors import GradientError
from mpiddl.gradients.hooks import wrapper_of
from mpiddl.gradients.in_flight import InFlight

__all__ = ["clip_grad_norm_"]

PIECE = 4096
"""Elements that are added up by one thread, in one order, whatever is around them."""
TOGETHER = 64
"""Pieces that are widened to float64 at a time: 2 MiB, most of which stays in a cache."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale the gradients of ``parameters``, in place, so that their norm is ``max_norm`` at most.

    In place of ``torch.nn.utils.clip_grad_norm_``, whose norm loses digits with the size of a
    gradient, and differs with the number of threads. This one is computed parameter by parameter,
    in pieces of a fixed length and in float64: it is the same for any buckets and threads, so that
    replicas stay equal to the last bit. Nothing is sent: after ``backward()`` every rank has the
    same gradients. With an ``OverlappedOptimizer`` it waits for them.

    Args:
        parameters: The parameters whose gradients are taken for one vector; ``model.parameters()``.
        max_norm: The largest norm that is left as it is.
        norm_type: 1, 2, infinity, or any other positive p.
        error_if_nonfinite: Raise if the norm is NaN or infinite; else the gradients become NaN or
            0, on all ranks together.

    Returns:
        The norm before clipping, without dimensions.

    Raises:
        ValueError: ``norm_type`` is not positive.
        GradientError: The norm is NaN or infinite, and ``error_if_nonfinite``.
    """
    p = float(norm_type)
    if not p > 0:
        raise ValueError(f"norm_type={norm_type!r} must be positive, such as 1, 2 or math.inf")
    of = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for parameter in of:
        if type(parameter.grad) is InFlight:
            wrapper_of(parameter).strategy.late_step.wait_for_gradients()
    gradients = [parameter.grad for parameter in of if parameter.grad is not None]
    total = _norm(gradients, p)
    if error_if_nonfinite and not torch.isfinite(total):
        raise GradientError(
            f"the norm of order {p:g} of the gradients is {total.item()}, which no scale makes "
            f"{max_norm}. DataParallel(nan_check='error') names the parameter and the rank; or "
            "leave error_if_nonfinite out"
        )
    _scale(gradients, max_norm / (total.double() + 1e-6))
    return total


def _scale(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    if factor.is_cuda and all(gradient.dtype.itemsize >= 4 for gradient in gradients):
        # The host need not know it, and does not wait.
        factor = factor.clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return
    scale = factor.item()  # a number is not rounded to the 16 bits of a gradient
    if gradients and not scale >= 1.0:  # NaN too
        torch._foreach_mul_(list(gradients), scale)


def _norm(gradients: Sequence[torch.Tensor], p: float) -> torch.Tensor:
    """The norm of all elements of all gradients."""
    flat = [flat for flat in map(_flat, gradients) if flat.numel()]
    if not flat:
        return torch.tensor(0.0)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in flat:
        by_device.setdefault(gradient.device, []).append(gradient)
    norms = torch.cat([_norms(group, p).to(flat[0].device) for group in by_device.values()])
    while len(norms) > 1:
        norms = _norms([norms], p)
    dtypes = {gradient.dtype for gradient in flat}
    return norms[0].to(functools.reduce(torch.promote_types, dtypes, torch.float32))


def _norms(flat: Sequence[torch.Tensor], p: float) -> torch.Tensor:
    """The norm of each piece of each gradient, in a fixed order, in float64."""
    norms, short = [], []
    for gradient in flat:
        whole = (gradient.numel() - 1) // PIECE * PIECE
        short.append(gradient[whole:] if whole else gradient)
        for part in torch.split(gradient[:whole], TOGETHER * PIECE) if whole else ():
            rows = part.double().view(-1, PIECE)
            norms.append(torch.linalg.vector_norm(rows, p, dim=1))
    for start in range(0, len(short), TOGETHER):
        batch = short[start : start + TOGETHER]
        pieces = torch.split(torch.cat(batch).double(), [piece.numel() for piece in batch])
        norms.append(torch.stack(torch._foreach_norm(pieces, p)))
    return torch.cat(norms)


def _flat(gradient: torch.Tensor) -> torch.Tensor:
    """All its values, in memory order."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if not gradient.is_contiguous():
        gradient = gapless(gradient)
        gradient = gradient.as_strided((gradient.numel(),), (1,))
    flat = gradient if gradient.dim() == 1 else gradient.view(-1)
    return flat.abs() if flat.is_complex() else flat
