"""Which gradient goes where. Arithmetic only: no MPI, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BucketPlan", "ParameterSpec", "PlannedBucket", "plan_buckets"]

FIRST_BUCKET_BYTES = 1 << 20


@dataclass(frozen=True)
class ParameterSpec:
    """What ranks must agree on about one parameter (or buffer).

    Attributes:
        name: As in ``model.named_parameters()``.
        shape: Its shape.
        strides: Of its gradient in memory; they decide the order of elements.
        dtype: For example ``"float32"``.
        itemsize: Bytes per element.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def length(self) -> int:
        """Number of elements."""
        length = 1
        for extent in self.shape:
            length *= extent
        return length


@dataclass(frozen=True)
class PlannedBucket:
    """Parameters (their places in the model's order) whose gradients are reduced as one buffer."""

    dtype: str
    members: tuple[int, ...]
    offsets: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class BucketPlan:
    """Gradients grouped into buckets, the same on every rank."""

    parameters: tuple[ParameterSpec, ...]
    buckets: tuple[PlannedBucket, ...]


def plan_buckets(
    parameters: Sequence[ParameterSpec],
    capacity: int,
    first_capacity: int = FIRST_BUCKET_BYTES,
) -> BucketPlan:
    """Group gradients into buckets of one dtype each.

    Parameters are taken last to first, the order in which ``backward`` finishes them. A bucket
    is closed before it would exceed its capacity; a larger parameter gets one of its own. The
    first bucket of a dtype is small, so that the exchange starts early.

    Args:
        parameters: In ``model.parameters()`` order.
        capacity: Largest bucket, in bytes.
        first_capacity: Largest first bucket of a dtype, in bytes.

    Returns:
        Buckets in the order in which they are expected to fill.

    Raises:
        ValueError: A capacity is not positive.

    Source:
        Li et al., "PyTorch Distributed", PVLDB 13(12), 2020 (gradient bucketing).
    """
    if capacity < 1 or first_capacity < 1:
        raise ValueError(f"bucket sizes must be positive, got {first_capacity} and {capacity}")
    filling: dict[str, list[int]] = {}
    filled: list[list[int]] = []
    started: set[str] = set()
    for place in reversed(range(len(parameters))):
        spec = parameters[place]
        members = filling.setdefault(spec.dtype, [])
        nbytes = spec.length * spec.itemsize
        held = sum(parameters[member].length for member in members) * spec.itemsize
        limit = capacity if spec.dtype in started else min(first_capacity, capacity)
        if members and held + nbytes > limit:
            filled.append(members)
            started.add(spec.dtype)
            filling[spec.dtype] = [place]
        else:
            members.append(place)
    filled += [members for members in filling.values() if members]
    # A bucket is complete with its last gradient, that of its first parameter.
    filled.sort(key=lambda members: -members[-1])
    return BucketPlan(tuple(parameters), tuple(_planned(parameters, members) for members in filled))


def _planned(parameters: Sequence[ParameterSpec], members: list[int]) -> PlannedBucket:
    offsets, length = [], 0
    for member in members:
        offsets.append(length)
        length += parameters[member].length
    return PlannedBucket(parameters[members[0]].dtype, tuple(members), tuple(offsets), length)
