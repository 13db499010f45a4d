"""What this rank did and when: the last events always, all of them while tracing.

An event is 32 bytes in a ring of them. To record one costs about a microsecond, so it is
always on: per gradient bucket, per step, per wait. What happens per parameter or per chunk is
recorded while ``recorder.tracing`` only, or it would push everything else out of a short ring.
"""

from __future__ import annotations

import enum
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "EVENT",
    "LAST_EVENTS",
    "Event",
    "Kind",
    "Recorder",
    "describe",
    "new_model",
    "record",
    "recorder",
]

EVENT = struct.Struct("<qhhiqq")
"""Nanoseconds (CLOCK_MONOTONIC), kind, model, subject, value, number (from 1)."""

LAST_EVENTS = 1000


class Kind(enum.IntEnum):
    """What happened. In brackets: subject, value. Each END is its BEGIN + 1."""

    FORWARD_BEGIN = 1
    FORWARD_END = 2
    BACKWARD_BEGIN = 3  # the first gradient of a backward is there [, number of the backward]
    BACKWARD_END = 4  # all gradients are reduced, or left in flight for the next forward
    GRADIENT = 5  # a parameter's gradient is there [its number]; while tracing only
    READY = 6  # a bucket has its last gradient [bucket, the number of that parameter]
    IN_FLIGHT = 7  # a bucket's all-reduce was launched [bucket, bytes]
    COMPLETE = 8  # a bucket's all-reduce is over [bucket, bytes]
    WAIT_BEGIN = 9  # this rank's main thread waits [bucket, or -1 for all]
    WAIT_END = 10
    CHUNK = 11  # a chunk was handed to the network [bucket's tag, bytes]; while tracing only
    PLAN = 12  # buckets were planned [number of buckets, bytes]
    STEP = 13  # an OverlappedOptimizer updated the parameters that were complete with [bucket]


class Event(NamedTuple):
    """One event, as read from a ring."""

    at: int
    kind: int
    model: int
    subject: int
    value: int
    number: int


class _Ring(NamedTuple):
    memory: bytearray | memoryview
    capacity: int
    backed: int
    """Events of lower numbers may be written; the others only after ``more``."""


class Recorder:
    """A ring of events in some memory, and what a reader must know to understand them.

    Any thread may record: each event has its own number, and its place follows from that.

    Attributes:
        about: Plain JSON that explains the numbers in events: rank, models, ...
        latest: By kind, the number of the last event of that kind; 0 for none.
        tracing: Events per parameter and per chunk are wanted too.
    """

    def __init__(self, length: int = LAST_EVENTS) -> None:
        self._numbers = itertools.count(1)  # next() cannot be interrupted by another thread
        self._ring = _Ring(bytearray(length * EVENT.size), length, 1 << 62)
        self._more: Callable[[int], int] | None = None
        self._growing = threading.Lock()
        self._on_describe: Callable[[], None] | None = None
        self.about: dict[str, Any] = {"models": {}}
        self.latest = [0] * (max(Kind) + 1)
        self.tracing = False

    def record(self, kind: int, model: int = 0, subject: int = -1, value: int = 0) -> None:
        """Note that something happened now."""
        number = next(self._numbers)
        memory, capacity, backed = self._ring
        if number >= backed:
            memory, capacity = self._grow(number)
        # The number comes last: without it an event does not count.
        _pack(memory, number % capacity * 32, _now(), kind, model, subject, value, number)
        self.latest[kind] = number

    @property
    def count(self) -> int:
        """Events so far."""
        return max(self.latest)

    def last(self, length: int) -> Iterator[Event]:
        """The last events, the newest first."""
        memory, capacity, _ = self._ring
        newest = self.count
        for number in range(newest, max(0, newest - min(length, capacity - 1)), -1):
            event = Event(*EVENT.unpack_from(memory, number % capacity * EVENT.size))
            if event.number == number:
                yield event

    def move(
        self,
        memory: bytearray | memoryview,
        on_describe: Callable[[], None] | None = None,
        more: Callable[[int], int] | None = None,
    ) -> None:
        """Go on in other memory; the last events come along.

        Args:
            memory: Holds ``len(memory) // 32`` events, all zero.
            on_describe: Called when ``about`` has changed.
            more: Is told how many events shall be backed by real memory and answers how many
                are; as long as the answer grows the ring does. Default: all of it is.
        """
        capacity = len(memory) // EVENT.size
        self._more, self._on_describe = more, on_describe
        backed = more(LAST_EVENTS) if more is not None else 1 << 62
        kept = list(self.last(min(LAST_EVENTS, capacity) - 1))
        self._numbers = itertools.count(len(kept) + 1)
        self.latest = [0] * len(self.latest)
        for number, event in enumerate(reversed(kept), 1):
            place = number % capacity * EVENT.size
            EVENT.pack_into(memory, place, *event._replace(number=number))
            self.latest[event.kind] = number
        self._ring = _Ring(memory, capacity, backed)

    def _grow(self, number: int) -> tuple[bytearray | memoryview, int]:
        """Have event ``number`` backed; where there is no more memory the ring is closed."""
        with self._growing:
            memory, capacity, backed = self._ring
            if number >= backed and self._more is not None:
                granted = min(self._more(2 * backed), capacity)
                full = granted <= number  # as long as it can get: from now on in circles
                capacity = granted if full else capacity
                backed = 1 << 62 if full or granted == capacity else granted
                self._ring = _Ring(memory, capacity, backed)
        return memory, capacity

    def describe(self, **facts: Any) -> None:
        """Add to what readers are told."""
        self.about.update(facts)
        if self._on_describe is not None:
            self._on_describe()


_pack = EVENT.pack_into
_now = time.monotonic_ns

recorder = Recorder()
"""This rank's."""

record = recorder.record


_models = itertools.count(1)


def new_model() -> int:
    """The number of a model in events; every rank must number its models in the same order."""
    return next(_models)


def describe(
    model: int, names: Sequence[str], buckets: Sequence[Mapping[str, Any]], **facts: Any
) -> None:
    """Explain the numbers in a model's events; again whenever its plan changes.

    Args:
        model: From 1; 0 is none.
        names: Of its trained parameters.
        buckets: Per bucket ``members`` (numbers of parameters), ``nbytes`` and ``tag``.
        facts: Anything else.
    """
    told = {"names": list(names), "buckets": [dict(bucket) for bucket in buckets], **facts}
    recorder.describe(models={**recorder.about["models"], str(model): told})
