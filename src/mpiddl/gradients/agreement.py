"""Do all ranks have the same? Compares what was gathered; sends nothing itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import zip_longest

from mpiddl.errors import MismatchError
from mpiddl.gradients.plan import BucketPlan, ParameterSpec

__all__ = ["describe", "digest", "first_difference", "odd_ones", "who_has_what"]


def odd_ones(values: Sequence[object]) -> list[int]:
    """Ranks whose value is not the most frequent one (rank 0's, where several are)."""
    if not values:
        return []
    counts = Counter(values)
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    return [rank for rank, value in enumerate(values) if value != usual]


def who_has_what(values: Sequence[object]) -> str:
    """``"'a' on rank 0, 2; 'b' on rank 1"``."""
    holders: dict[object, list[str]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(str(rank))
    return "; ".join(f"{value!r} on rank {', '.join(ranks)}" for value, ranks in holders.items())


def describe(
    plan: BucketPlan,
    state: Sequence[ParameterSpec],
    algorithm: str,
    sparse: Collection[str] = (),
) -> list[str]:
    """One line for all that ranks must agree on, in an order that names causes first.

    Args:
        plan: Buckets of the trained parameters with dense gradients.
        state: All parameters and buffers, trained or not.
        algorithm: Name of the all-reduce algorithm.
        sparse: Names of the trained parameters with sparse gradients.
    """
    kinds = dict.fromkeys((spec.name for spec in plan.parameters), "trained")
    kinds.update(dict.fromkeys(sparse, "trained, sparse"))
    lines = [_describe_tensor(spec, kinds.get(spec.name, "not trained")) for spec in state]
    lines += [
        f"bucket {number}: {bucket.dtype}, elements {bucket.start} to {bucket.stop}, "
        f"parameters {bucket.members}"
        for number, bucket in enumerate(plan.buckets)
    ]
    return [*lines, f"algorithm {algorithm}"]


def _describe_tensor(spec: ParameterSpec, kind: str) -> str:
    return f"{spec.name}: {spec.dtype}{list(spec.shape)}, strides {list(spec.strides)}, {kind}"


def digest(lines: Sequence[str]) -> str:
    """A fingerprint that differs whenever the descriptions do."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def first_difference(descriptions: Sequence[Sequence[str]]) -> MismatchError:
    """The error that names the first tensor or bucket in which the ranks differ."""
    for lines in zip_longest(*descriptions, fillvalue="nothing"):
        if odd_ones(lines):
            return MismatchError(
                f"the model differs between ranks: {who_has_what(lines)}. Build the same model "
                "with the same frozen parameters, bucket_size and algorithm on every rank"
            )
    raise AssertionError("equal descriptions have different digests")
