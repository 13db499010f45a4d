"""A bucket: gradients that are reduced as one buffer."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from mpiddl.devices.base import Buffer
from mpiddl.gradients.plan import PlannedBucket

__all__ = ["Bucket", "State"]


class State(enum.Enum):
    """The states of a bucket on its way through a step."""

    FILLING = "filling"
    READY = "ready"
    IN_FLIGHT = "in flight"
    COMPLETE = "complete"


class Bucket:
    """One stretch of gradients.

    Attributes:
        number: Its place in plan order.
        buffer: The gradients' memory.
        members: Parameters (their places in the model) whose gradients are in it.
        names: The names of these parameters.
        together: Members whose gradients are brought in when the last gradient is here.
        num_missing: How many of their gradients are not here yet.
        state: Its state in this step.
        callers: The streams on which its gradients came.
    """

    __slots__ = (
        "buffer",
        "callers",
        "members",
        "names",
        "num_missing",
        "number",
        "state",
        "together",
    )

    def __init__(
        self, number: int, planned: PlannedBucket, names: Sequence[str], buffer: Buffer
    ) -> None:
        self.number = number
        self.buffer = buffer
        self.members = planned.members
        self.names = names
        self.together: list[int] = []
        self.callers: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Filling again: no gradient of the coming backward is here."""
        self.num_missing = len(self.members)
        self.state = State.FILLING
        self.callers.clear()
