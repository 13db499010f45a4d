"""Do all ranks have the same plan? Compares what was gathered; sends nothing itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from mpiddl.buckets.plan import BucketPlan, ParameterSpec
from mpiddl.errors import MismatchError

__all__ = ["describe", "first_difference", "odd_ones"]


def odd_ones(values: Sequence[object]) -> list[int]:
    """Ranks whose value is not the most frequent one (rank 0's, where several are)."""
    if not values:
        return []
    counts = Counter(values)
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    return [rank for rank, value in enumerate(values) if value != usual]


def describe(plan: BucketPlan) -> list[str]:
    """One line per parameter, then one per bucket, for comparison between ranks."""
    lines = [_describe_parameter(spec) for spec in plan.parameters]
    return lines + [
        f"bucket {number}: {bucket.dtype}, {bucket.length} elements, parameters {bucket.members}"
        for number, bucket in enumerate(plan.buckets)
    ]


def _describe_parameter(spec: ParameterSpec) -> str:
    return f"{spec.name}: {spec.dtype}{list(spec.shape)}, strides {list(spec.strides)}"


def first_difference(descriptions: Sequence[Sequence[str]]) -> MismatchError:
    """The error that names the ranks and the first parameter or bucket in which they differ."""
    for lines in zip_longest(*descriptions, fillvalue="nothing"):
        odd = odd_ones(lines)
        if odd:
            usual = next(rank for rank in range(len(lines)) if rank not in odd)
            return MismatchError(
                f"the model differs between ranks: {lines[odd[0]]!r} on rank "
                f"{', '.join(map(str, odd))}, {lines[usual]!r} on rank {usual}. Build the same "
                "model with the same frozen parameters and the same bucket_size on every rank"
            )
    raise AssertionError("plans with equal descriptions have different digests")
