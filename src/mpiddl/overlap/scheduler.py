"""From ready gradients to reduced buckets: what is ready flies, nothing waits for an order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpiddl.buckets.bucket import Bucket, State
from mpiddl.errors import GradientError
from mpiddl.event_words import quoted
from mpiddl.events import Kind, record, recorder
from mpiddl.overlap import watchdog
from mpiddl.overlap.engine import Engine
from mpiddl.overlap.spans import span
from mpiddl.overlap.work import Work

__all__ = ["Scheduler"]

LEFT_OVER_SECONDS = 10.0

Reduce = Callable[[int], Work]
"""Starts the all-reduce of the bucket with this number."""


class Scheduler:
    """Launches each bucket as soon as its last gradient is there.

    Args:
        buckets: In plan order.
        names: The parameters' names, in model order, for errors.
        ordered: Launch strictly in plan order, for algorithms that a library runs.
        engine: Drives what was launched.
        model: Its number in events.

    Attributes:
        backwards: Those begun so far.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        names: Sequence[str],
        ordered: bool,
        engine: Engine,
        model: int = 0,
    ) -> None:
        self.backwards = 0
        self._model = model
        self._buckets = buckets
        self._names = names
        self._ordered = ordered
        self._engine = engine
        self._bucket_of = {
            member: number for number, bucket in enumerate(buckets) for member in bucket.missing
        }
        self._works: list[Work] = []
        self._launched = 0  # with ordered: buckets launched so far
        watchdog.watch(self.describe)

    def begin(self) -> None:
        """A backward starts: every bucket is filling.

        Raises:
            GradientError: An earlier backward raised in the middle, and its buckets are still in
                flight: writing to them now would spoil what other ranks receive.
        """
        # Where all ranks met the same error all have sent the same buckets, and they complete.
        self._engine.drive(self._works, LEFT_OVER_SECONDS)
        if not all(work.complete for work in self._works):
            raise GradientError(
                "an earlier backward of this model raised while buckets were in flight, and other "
                "ranks have not sent theirs: the model cannot go on. Let the first error end "
                "the job"
            )
        self._works, self._launched = [], 0
        for bucket in self._buckets:
            bucket.reset()
        self.backwards += 1
        record(Kind.BACKWARD_BEGIN, self._model, value=self.backwards)

    def ready(self, member: int, reduce: Reduce) -> None:
        """Parameter ``member``'s gradient is complete on this rank.

        Raises:
            GradientError: It was ready before in this backward.
        """
        number = self._bucket_of[member]
        bucket = self._buckets[number]
        if member not in bucket.missing:
            raise GradientError(
                f"the gradient of {self._names[member]!r} became ready twice in one backward "
                "(reentrant checkpointing? an earlier backward that raised?): it may be in flight "
                "already"
            )
        bucket.take(member)
        if recorder.tracing:
            record(Kind.GRADIENT, self._model, member)
        if not bucket.missing:
            bucket.state = State.READY
            record(Kind.READY, self._model, number, member)
            self._launch(number, reduce)
        else:
            self._engine.poll()

    def _launch(self, number: int, reduce: Reduce) -> None:
        if not self._ordered:
            self._start(number, reduce)
            return
        while self._launched < len(self._buckets):
            if self._buckets[self._launched].state is not State.READY:
                return
            self._start(self._launched, reduce)
            self._launched += 1

    def _start(self, number: int, reduce: Reduce) -> None:
        bucket = self._buckets[number]
        bucket.state = State.IN_FLIGHT
        record(Kind.IN_FLIGHT, self._model, number, bucket.buffer.nbytes)
        self._works.append(reduce(number))

    def contribute_zeros(self, reduce: Reduce) -> None:
        """This rank has no sample: take part in every bucket all the same."""
        self.begin()
        for number, bucket in enumerate(self._buckets):
            bucket.take_zeros()
            bucket.state = State.READY
            self._launch(number, reduce)

    def finish(self) -> None:
        """Wait for every bucket.

        Raises:
            GradientError: Some parameter got no gradient in this backward.
        """
        absent = sorted(member for bucket in self._buckets for member in bucket.missing)
        if absent:
            raise GradientError(self._absent_message(absent))
        works, self._works = self._works, []
        with span(Kind.WAIT_BEGIN, self._model):
            for work in works:
                work.wait()
        for bucket in self._buckets:
            bucket.state = State.COMPLETE
        record(Kind.BACKWARD_END, self._model, value=self.backwards)

    def describe(self) -> str:
        """Where this model's backward is, in words, for the watchdog's thread."""
        if not self.backwards:
            return f"model {self._model} has begun no backward yet"
        open_ = [
            _in_words(number, bucket, self._names)
            for number, bucket in enumerate(self._buckets)
            if bucket.state is not State.COMPLETE
        ]
        if not open_:
            return f"model {self._model} has ended backward {self.backwards}"
        more = f" and {len(open_) - 4} more buckets" if len(open_) > 4 else ""
        return f"model {self._model} is in backward {self.backwards}: {', '.join(open_[:4])}{more}"

    def _absent_message(self, absent: Sequence[int]) -> str:
        shown = ", ".join(repr(self._names[member]) for member in absent[:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        return (
            f"backward gave no gradient to {shown}{more}: the loss does not depend on them. Every "
            "parameter must take part on every rank; freeze those that never do with "
            "requires_grad_(False) before wrapping, or add 0 * parameter.sum() to the loss. "
            "(With activation checkpointing, pass use_reentrant=False.)"
        )


def _in_words(number: int, bucket: Bucket, names: Sequence[str]) -> str:
    if bucket.missing:
        missing = quoted([names[member] for member in sorted(bucket.missing)])
        return f"bucket {number} lacks the gradients of {missing}"
    members = quoted([names[member] for member in bucket.parameters])
    return f"bucket {number} ({members}) is {bucket.state.value}"
