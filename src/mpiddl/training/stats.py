"""What the exchange of one model has cost."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BucketStats", "Stats"]


@dataclass
class BucketStats:
    """One bucket of the present plan.

    Attributes:
        nbytes: Of its gradients.
        parameters: Names of the parameters whose gradients are in it, whole or in part.
        in_flight_seconds: From launch to completion, the mean of its exchanges.
        exposed_seconds: What the main thread waited for it after backward, the mean.
    """

    nbytes: int
    parameters: list[str]
    in_flight_seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass
class Stats:
    """Sums since the model was wrapped, on this rank.

    Attributes:
        backwards: Backward passes whose gradients were reduced.
        reduced_bytes: Gradient bytes that went through the all-reduce.
        compute_seconds: From the begin of each forward to the end of its backward, without the
            exposed time.
        communication_seconds: In which at least one bucket was in flight, at most: the times of
            all buckets, which overlap each other, added.
        exposed_seconds: In which the main thread did communication or waited for it, gradient
            hooks included: what the computation did not hide.
        buckets: Of the present plan.
    """

    backwards: int = 0
    reduced_bytes: int = 0
    compute_seconds: float = 0.0
    communication_seconds: float = 0.0
    exposed_seconds: float = 0.0
    buckets: list[BucketStats] = field(default_factory=list)
