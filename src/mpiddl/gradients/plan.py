"""Which gradient goes where. Arithmetic only: no MPI, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpiddl.base.segments import split

__all__ = ["BucketPlan", "ParameterSpec", "PlannedBucket", "plan_buckets"]

EDGE_BUCKET_BYTES = 1 << 20


@dataclass(frozen=True)
class ParameterSpec:
    """The facts about one parameter (or buffer) that ranks must agree on.

    Attributes:
        name: Its name in ``model.named_parameters()``.
        shape: Its shape.
        strides: The strides of its gradient in memory; they decide the order of elements.
        dtype: Its dtype, for example ``"float32"``.
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
    """A stretch of an arena that is reduced as one buffer.

    Attributes:
        dtype: The dtype of the arena.
        start: First element.
        stop: One past the last element.
        members: Parameters (their places in the model's order) whose gradients are in it, whole or
            in part.
    """

    dtype: str
    start: int
    stop: int
    members: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class BucketPlan:
    """Gradients side by side in one arena per dtype, and the arenas cut into buckets.

    Attributes:
        parameters: In the model's order.
        offsets: The place at which each parameter's gradient starts in the arena of its dtype.
        buckets: In the order in which they are expected to fill.
    """

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    buckets: tuple[PlannedBucket, ...]

    @property
    def lengths(self) -> dict[str, int]:
        """Elements of the arena of each dtype."""
        lengths = dict.fromkeys((spec.dtype for spec in self.parameters), 0)
        for spec in self.parameters:
            lengths[spec.dtype] += spec.length
        return lengths


def plan_buckets(
    parameters: Sequence[ParameterSpec],
    capacity: int,
    edge_capacity: int = EDGE_BUCKET_BYTES,
    order: Sequence[int] | None = None,
) -> BucketPlan:
    """Group gradients into buckets of one dtype each.

    A bucket is closed before it would exceed its capacity; a larger parameter is cut into equal
    pieces, a bucket each. The first bucket of a dtype is small, so that the exchange starts early,
    and so is the last of all, whose exchange no computation hides.

    Args:
        parameters: In ``model.parameters()`` order.
        capacity: Largest bucket, in bytes.
        edge_capacity: Largest first bucket of a dtype, and largest last bucket, in bytes.
        order: The parameters' places, in the order in which ``backward`` finishes them; default
            last to first.

    Raises:
        ValueError: A capacity is not positive.

    Source:
        Li et al., "PyTorch Distributed", PVLDB 13(12), 2020 (gradient bucketing); Peng et al., "A
        generic communication scheduler", SOSP 2019 (pieces of large gradients).
    """
    if capacity < 1 or edge_capacity < 1:
        raise ValueError(f"bucket sizes must be positive, got {edge_capacity} and {capacity}")
    edge_capacity = min(edge_capacity, capacity)
    order = range(len(parameters))[::-1] if order is None else order
    arenas: dict[str, _Arena] = {}
    for number, place in enumerate(order):
        spec = parameters[place]
        arena = arenas.setdefault(spec.dtype, _Arena(capacity, edge_capacity, spec))
        arena.append(place, spec.length, number)
    closed = [bucket for arena in arenas.values() for bucket in arena.close()]
    closed.sort(key=lambda bucket: bucket[0])  # by their last gradient; pieces keep their order
    offsets = {place: start for arena in arenas.values() for place, start in arena.offsets.items()}
    buckets = [bucket for _, bucket in closed]
    if buckets:
        buckets[-1:] = _with_small_end(buckets[-1], parameters, offsets, edge_capacity)
    starts = tuple(offsets[place] for place in range(len(parameters)))
    return BucketPlan(tuple(parameters), starts, tuple(buckets))


class _Arena:
    """Gradients of one dtype, one after the other, cut into buckets on the way."""

    def __init__(self, capacity: int, edge_capacity: int, spec: ParameterSpec) -> None:
        self.offsets: dict[int, int] = {}
        self._dtype = spec.dtype
        self._longest = max(1, capacity // spec.itemsize)
        self._limit = edge_capacity // spec.itemsize  # of the first bucket; then the longest
        self._start = self._stop = self._number = 0
        self._members: list[int] = []
        self._closed: list[tuple[int, PlannedBucket]] = []

    def append(self, place: int, length: int, number: int) -> None:
        """The gradient of parameter ``place``, the ``number``-th to be finished."""
        if self._stop - self._start + length > self._limit:
            self.close()
        self.offsets[place] = start = self._stop
        for piece in split(length, max(1, -(-length // self._longest))):
            if piece.start:
                self.close()
            self._stop, self._number = start + piece.stop, number
            self._members.append(place)

    def close(self) -> list[tuple[int, PlannedBucket]]:
        """End the bucket that is filling; all so far, each with the number of its last gradient."""
        if self._members:
            members = tuple(self._members)
            bucket = PlannedBucket(self._dtype, self._start, self._stop, members)
            self._closed.append((self._number, bucket))
            self._start, self._members, self._limit = self._stop, [], self._longest
        return self._closed


def _with_small_end(
    bucket: PlannedBucket,
    parameters: Sequence[ParameterSpec],
    offsets: Mapping[int, int],
    capacity: int,
) -> list[PlannedBucket]:
    """The last bucket; in two, between parameters where that is possible, if it is large."""
    length = max(1, capacity // parameters[bucket.members[0]].itemsize)
    if bucket.length <= length:
        return [bucket]
    earliest = bucket.stop - length
    cut = min(
        (offsets[m] for m in bucket.members if earliest <= offsets[m] < bucket.stop),
        default=earliest,
    )
    before = tuple(m for m in bucket.members if offsets[m] < cut)
    # An empty gradient may lie at the cut.
    after = tuple(
        m for m in bucket.members if max(offsets[m], offsets[m] + parameters[m].length - 1) >= cut
    )
    return [
        replace(bucket, stop=cut, members=before),
        replace(bucket, start=cut, members=after),
    ]
