"""What this rank did and when: the last events always, all of them while tracing.

An event is 32 bytes in a ring of them. To record one costs about a microsecond, so it is
always on: per gradient bucket, per step, per wait; not per byte.
"""

from __future__ import annotations

import enum
import struct
import time

__all__ = ["EVENT", "Kind", "Recorder", "record"]

EVENT = struct.Struct("<qhhiqq")
"""Nanoseconds (CLOCK_MONOTONIC), kind, model, subject, value, spare."""


class Kind(enum.IntEnum):
    """What happened. In brackets: subject, value."""

    FORWARD_BEGIN = 1
    FORWARD_END = 2
    BACKWARD_BEGIN = 3
    BACKWARD_END = 4  # all gradients are reduced, or left in flight for the next forward
    GRADIENT = 5  # a parameter's gradient is there [its number]
    READY = 6  # a bucket has its last gradient [bucket, the number of that parameter]
    IN_FLIGHT = 7  # a bucket's all-reduce was launched [bucket, bytes]
    COMPLETE = 8  # a bucket's all-reduce is over [bucket, bytes]
    WAIT_BEGIN = 9  # this rank's main thread waits [bucket, or -1 for all]
    WAIT_END = 10
    CHUNK = 11  # a chunk was handed to the network [bucket's tag, bytes]
    PLAN = 12  # buckets were planned [number of buckets, bytes]
    CALL_BEGIN = 13  # a collective that the user called, or one of mpiddl's own small ones
    CALL_END = 14
    STEP = 15  # the optimizer stepped [bucket, or -1 for all]


class Recorder:
    """A ring of events in some memory.

    Args:
        memory: Holds ``len(memory) // 32`` events.
    """

    def __init__(self, memory: bytearray | memoryview) -> None:
        self._memory = memory
        self._capacity = len(memory) // EVENT.size
        self.count = 0

    def record(self, kind: int, model: int = 0, subject: int = -1, value: int = 0) -> None:
        """Note that something happened now."""
        at = (self.count % self._capacity) * EVENT.size
        EVENT.pack_into(
            self._memory, at, time.monotonic_ns(), kind, model, subject, value, self.count
        )
        self.count += 1


_recorder = Recorder(bytearray(1000 * EVENT.size))


def record(kind: int, model: int = 0, subject: int = -1, value: int = 0) -> None:
    """Note on this rank's recorder that something happened now."""
    _recorder.record(kind, model, subject, value)
