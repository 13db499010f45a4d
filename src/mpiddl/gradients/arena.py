"""The gradients of a model, as views of the memory that is exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from mpiddl.base.units import format_bytes
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.host import HOST
from mpiddl.devices.registry import device_of
from mpiddl.errors import GpuMemoryError, GradientError
from mpiddl.gradients.bucket import Bucket
from mpiddl.gradients.plan import BucketPlan, ParameterSpec

__all__ = ["Gradients", "arenas_for", "spec_of"]

SMALL_BYTES = 16 << 10
"""To copy a gradient up to this size takes less than to call for a copy."""


def spec_of(name: str, parameter: torch.Tensor) -> ParameterSpec:
    """The facts about a parameter or buffer that ranks must agree on.

    A gradient has the parameter's own strides (channels_last too) where these are gapless,
    else the nearest gapless ones.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return ParameterSpec(name, tuple(parameter.shape), strides, dtype, parameter.dtype.itemsize)


def arenas_for(plan: BucketPlan, device: Device, world: World) -> dict[str, Buffer]:
    """Memory for all gradients of ``plan``, by dtype. Collective over ``world``.

    Raises:
        GpuMemoryError: On every rank, if one GPU has not so much.
    """
    try:
        return {
            dtype: device.empty(length, getattr(torch, dtype), world)
            for dtype, length in plan.lengths.items()
        }
    except GpuMemoryError as error:
        sizes = {
            dtype: format_bytes(length * getattr(torch, dtype).itemsize)
            for dtype, length in plan.lengths.items()
        }
        largest = max(bucket.length for bucket in plan.buckets)
        raise GpuMemoryError(
            f"{error}. The gradients are {', '.join(f'{s} of {d}' for d, s in sizes.items())}, in "
            f"{len(plan.buckets)} buckets of at most {largest} elements, and exist once: one "
            "allocation for each dtype, whatever bucket_size is. Wrap the model before the first "
            "batch, freeze parameters, or give each rank a GPU of its own"
        ) from None


class Gradients:
    """Arenas, one per dtype, their buckets, and every parameter's view.

    Gradients exist once: what is taken in is from then on a view of an arena.

    Args:
        plan: The place of each gradient.
        parameters: In the model's order.
        arenas: Memory, by dtype.

    Attributes:
        device: The device that they are on.
        buckets: In plan order.
        views: Each parameter's gradient, in the model's order.
        together_in: The bucket with which a small gradient is brought in; None for large ones.
    """

    def __init__(
        self,
        plan: BucketPlan,
        parameters: Sequence[torch.nn.Parameter],
        arenas: Mapping[str, Buffer],
    ) -> None:
        self._plan = plan
        self.device = next((device_of(arena) for arena in arenas.values()), HOST)
        self._parameters = parameters
        self.buckets = [
            Bucket(
                number,
                planned,
                [plan.parameters[member].name for member in planned.members],
                arenas[planned.dtype][planned.start : planned.stop],
            )
            for number, planned in enumerate(plan.buckets)
        ]
        self.views = [
            arenas[spec.dtype].as_strided(spec.shape, spec.strides, offset)
            for spec, offset in zip(plan.parameters, plan.offsets, strict=True)
        ]
        self._caller_of = [0] * len(parameters)  # the stream on which each gradient came
        self._buckets_of: list[list[Bucket]] = [[] for _ in parameters]
        self._pieces: list[list[slice]] = [[] for _ in parameters]
        for bucket, planned in zip(self.buckets, plan.buckets, strict=True):
            for member in planned.members:
                offset, length = plan.offsets[member], plan.parameters[member].length
                piece = slice(max(planned.start - offset, 0), min(planned.stop - offset, length))
                self._pieces[member].append(piece)
                self._buckets_of[member].append(bucket)
        self.together_in = [
            buckets[0] if len(buckets) == 1 and view.nbytes <= SMALL_BYTES else None
            for buckets, view in zip(self._buckets_of, self.views, strict=True)
        ]
        for bucket in self.buckets:
            bucket.together = [m for m in bucket.members if self.together_in[m] is bucket]

    def buckets_of(self, member: int) -> Sequence[Bucket]:
        """The buckets that a parameter's gradient is in."""
        return self._buckets_of[member]

    def came(self, member: int) -> None:
        """A gradient is there, on the caller's stream; to be told where that matters."""
        self._caller_of[member] = caller = self.device.caller()
        for bucket in self._buckets_of[member]:
            bucket.callers.add(caller)

    def take(self, member: int) -> Sequence[Bucket] | Iterator[Bucket]:
        """Bring a fresh gradient in and make ``grad`` a view; gives each bucket that has its part.

        Autograd leaves the gradient in one of three places: in the view itself, which it added
        to; in a tensor of its own, where ``grad`` was None; or in whatever tensor the user
        had put there. The copy is made while the gradient is hot in the cache, and a large one
        goes piece by piece, so that a piece is reduced while it is hot too. Small ones wait for
        ``fill``.
        """
        if self.together_in[member] is not None:
            return self._buckets_of[member]
        parameter, view = self._parameters[member], self.views[member]
        gradient = parameter.grad
        if gradient is not view:
            assert gradient is not None
            if gradient.requires_grad:
                gradient = gradient.detach()
            if len(self._pieces[member]) > 1 and gradient.stride() == view.stride():
                return self._take_in_pieces(member, gradient)
            with self._after(member):
                view.copy_(gradient)
            parameter.grad = view
        return self._buckets_of[member]

    def _take_in_pieces(self, member: int, gradient: torch.Tensor) -> Iterator[Bucket]:
        view = self.views[member]
        source, target = (t.as_strided((view.numel(),), (1,)) for t in (gradient, view))
        for bucket, piece in zip(self._buckets_of[member], self._pieces[member], strict=True):
            with self._after(member):
                target[piece].copy_(source[piece])
            yield bucket
        self._parameters[member].grad = view

    def _after(self, member: int) -> AbstractContextManager[object]:
        """Run what is asked inside once the gradient is there, before its memory is given away."""
        return self.device.after((self._caller_of[member],))

    def fill(self, bucket: Bucket) -> None:
        """Bring the small gradients of a bucket in, all of which are here.

        Raises:
            GradientError: One was taken away since it was announced.
        """
        targets, sources, owners = [], [], []
        for member in bucket.together:
            parameter, view = self._parameters[member], self.views[member]
            gradient = parameter.grad
            if gradient is view:
                continue
            if gradient is None:
                raise GradientError(
                    f"the gradient of {self._plan.parameters[member].name!r} was set to None "
                    "during backward, by a hook: gradients belong to the exchange until backward "
                    "is over"
                )
            targets.append(view)
            sources.append(gradient)
            owners.append(parameter)
        if targets:
            # create_graph has gradients enabled
            with torch.no_grad(), self.device.after(bucket.callers):
                torch._foreach_copy_(targets, sources)
        for parameter, view in zip(owners, targets, strict=True):
            parameter.grad = view

    def take_nothing(self, member: int) -> Sequence[Bucket] | Iterator[Bucket]:
        """No gradient came: what is in ``grad`` already stays, and None counts as zero."""
        parameter = self._parameters[member]
        if parameter.grad is None:
            self.views[member].zero_()
            parameter.grad = self.views[member]
        return self.take(member)

    def release(self) -> None:
        """Move the gradients that are here out of the arenas, which are laid out anew."""
        for parameter, view in zip(self._parameters, self.views, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() == view.data_ptr():
                parameter.grad = view.clone()
        # What is written there next may come on any stream. This happens a few times in all.
        moved = self.device.settled()
        while not moved.done():
            pass
