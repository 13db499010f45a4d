"""A bucket's memory, and gradients as views of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch

from mpiddl.buckets.plan import ParameterSpec, PlannedBucket
from mpiddl.devices.base import Buffer

__all__ = ["Bucket", "State", "spec_of"]


class State(enum.Enum):
    """Where a bucket is on its way through a step."""

    FILLING = "filling"
    READY = "ready"
    IN_FLIGHT = "in flight"
    COMPLETE = "complete"


def spec_of(name: str, parameter: torch.Tensor) -> ParameterSpec:
    """What ranks must agree on about a parameter or buffer.

    A gradient has the parameter's own strides (channels_last too) where these are gapless,
    else the nearest gapless ones.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return ParameterSpec(name, tuple(parameter.shape), strides, dtype, parameter.dtype.itemsize)


class Bucket:
    """Gradients of one dtype in one contiguous buffer.

    Gradients exist once: after ``take`` a parameter's ``grad`` is a view of ``buffer``.
    """

    def __init__(
        self,
        planned: PlannedBucket,
        specs: Sequence[ParameterSpec],
        parameters: Sequence[torch.nn.Parameter],
        buffer: Buffer,
    ) -> None:
        self.parameters = {member: parameters[member] for member in planned.members}
        self.buffer = buffer
        self._views = {
            member: self.buffer.as_strided(specs[member].shape, specs[member].strides, offset)
            for member, offset in zip(planned.members, planned.offsets, strict=True)
        }
        self.reset()

    def reset(self) -> None:
        """Filling again: no gradient of the coming backward is here."""
        self.missing = set(self._views)
        self.state = State.FILLING

    def take(self, member: int) -> None:
        """Bring a fresh gradient in and make ``grad`` a view of the buffer.

        Autograd leaves the gradient in one of three places: in the view itself, which it added
        to; in a tensor of its own, where ``grad`` was None; or in whatever tensor the user
        had put there. The copy is made while the gradient is hot in the cache.
        """
        parameter, view = self.parameters[member], self._views[member]
        gradient = parameter.grad
        assert gradient is not None
        if gradient is not view:
            if gradient.data_ptr() != view.data_ptr() or gradient.stride() != view.stride():
                view.copy_(gradient.detach())
            parameter.grad = view
        self.missing.discard(member)

    def take_zeros(self) -> None:
        """A rank without samples: what is here already stays, a gradient that is None is zero."""
        for member in sorted(self.missing):
            parameter = self.parameters[member]
            if parameter.grad is None:
                self._views[member].zero_()
                parameter.grad = self._views[member]
            self.take(member)
