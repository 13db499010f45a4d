"""From ready gradients to reduced buckets, each of which starts when its last gradient arrives."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence

from mpiddl.engine.bucket_reductions import BucketReductions
from mpiddl.engine.engine import Engine
from mpiddl.engine.work import Work
from mpiddl.errors import GradientError
from mpiddl.gradients.arena import Gradients
from mpiddl.gradients.bucket import Bucket, State
from mpiddl.observe import watchdog
from mpiddl.observe.event_words import quoted
from mpiddl.observe.events import Kind, record, recorder
from mpiddl.observe.spans import span

__all__ = ["Scheduler"]

LEFT_OVER_SECONDS = 10.0


class Scheduler:
    """Starts each bucket's all-reduce as soon as its last gradient is there.

    Args:
        gradients: The gradients and their buckets, in plan order.
        names: The parameters' names, in model order, for errors.
        model: Number of the model, in events.
        reductions: Starts the reduction of a bucket; where a library runs it, buckets are started
            strictly in plan order.
        engine: Drives what was started.
        holds_back: Start nothing before the end of backward.
        backwards: Number of backwards of this model before this layout.

    Attributes:
        backwards: Number of backwards that have begun so far.
        arrived: Parameters in the order in which their gradients came in this backward.
        works: The work of each bucket in this backward; None before it is started.
        late: Whether the host runs ahead of the gradients.
        seconds: Time spent in ``ready`` in this backward; zero where the host runs ahead.
        exposed: Seconds that ``wait`` has spent on each bucket so far.
    """

    def __init__(
        self,
        gradients: Gradients,
        names: Sequence[str],
        model: int,
        reductions: BucketReductions,
        engine: Engine,
        holds_back: bool = False,
        backwards: int = 0,
    ) -> None:
        self.backwards = backwards
        self.late = gradients.device.late
        self._gradients = gradients
        self._buckets = gradients.buckets
        self._names = names
        self._model = model
        self._reductions = reductions
        self._engine = engine
        self._weight = 1.0  # of this rank's gradients in this backward
        self._started = 0  # buckets started so far, where that is in plan order
        self._came = [False] * len(names)
        self._holds_back = holds_back
        self._held: list[int] = []  # ready, and not taken in before the end of backward
        self.arrived: list[int] = []
        self.works: list[Work | None] = [None] * len(self._buckets)
        self.seconds = 0.0
        self.exposed = [0.0] * len(self._buckets)
        watchdog.watch(self.describe)

    def refuse_left_over(self) -> None:
        """Complete what an earlier backward has left in flight.

        Raises:
            GradientError: An earlier backward raised in the middle, and its buckets are still in
                flight: writing to them now would spoil what other ranks receive.
        """
        # Where all ranks met the same error all have sent the same buckets, and they complete.
        works = [work for work in self.works if work is not None and not work.complete]
        if not works:
            return
        until = time.monotonic() + LEFT_OVER_SECONDS
        self._engine.drive(works, lambda: time.monotonic() > until)
        if not all(work.complete for work in works):
            raise GradientError(
                "an earlier backward of this model raised while buckets were in flight, and other "
                "ranks have not sent theirs: the model cannot go on. Let the first error end "
                "the job"
            )

    def begin(self, weight: float) -> None:
        """A backward starts: every bucket is filling, and this rank's gradients weigh ``weight``
        in the sum over ranks."""
        self._weight = weight
        self.works, self._started = [None] * len(self._buckets), 0
        self._came, self.arrived, self._held = [False] * len(self._came), [], []
        self.seconds = 0.0
        for bucket in self._buckets:
            bucket.reset()
        self.backwards += 1
        record(Kind.BACKWARD_BEGIN, self._model, value=self.backwards)

    def ready(self, member: int) -> None:
        """Parameter ``member``'s gradient is complete on this rank.

        Raises:
            GradientError: It was ready before in this backward.
        """
        if self._came[member]:
            raise GradientError(
                f"the gradient of {self._names[member]!r} became ready twice in one backward "
                "(reentrant checkpointing? an earlier backward that raised?): it may be in flight "
                "already"
            )
        self._came[member] = True
        self.arrived.append(member)
        if recorder.tracing:
            record(Kind.GRADIENT, self._model, member)
        if self.late:
            self._gradients.came(member)
        if self._holds_back:
            self._held.append(member)
            return
        bucket = self._gradients.together_in[member]
        if bucket is not None and bucket.num_missing > 1 and not self._engine.nudge_is_due:
            bucket.num_missing -= 1  # as most gradients: nothing to do yet
            return
        began = time.perf_counter()
        self._launch(member, self._gradients.take(member))
        self._engine.nudge()
        if not self.late:
            self.seconds += time.perf_counter() - began

    def no_more(self) -> None:
        """Backward is over on this rank: start what was held back."""
        held, self._held = self._held, []
        for member in held:
            self._launch(member, self._gradients.take(member))
            self._engine.nudge()

    def contribute_nothing(self, members: Iterable[int]) -> None:
        """This rank has no gradients for ``members``: take part in their buckets all the same."""
        for member in members:
            self._came[member] = True
            if self.late:
                self._gradients.came(member)
            self._launch(member, self._gradients.take_nothing(member))

    def _launch(self, member: int, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            bucket.num_missing -= 1
            if not bucket.num_missing:
                self._filled(bucket, member)

    def _filled(self, bucket: Bucket, member: int) -> None:
        self._gradients.fill(bucket)
        bucket.state = State.READY
        record(Kind.READY, self._model, bucket.number, member)
        if not self._reductions.ordered:
            self._start(bucket)
            return
        while self._started < len(self._buckets):
            if self._buckets[self._started].state is not State.READY:
                break
            self._start(self._buckets[self._started])
            self._started += 1

    def _start(self, bucket: Bucket) -> None:
        bucket.state = State.IN_FLIGHT
        record(Kind.IN_FLIGHT, self._model, bucket.number, bucket.buffer.nbytes)
        self.works[bucket.number] = self._reductions.start(bucket, self._weight)

    @property
    def absent(self) -> list[int]:
        """Parameters whose gradients have not come in this backward."""
        return [member for member, came in enumerate(self._came) if not came]

    def all_complete(self, buckets: Iterable[Bucket]) -> bool:
        """Whether ``wait`` for these buckets would return at once."""
        works = (self.works[bucket.number] for bucket in buckets)
        return all(work is None or work.complete for work in works)

    def outlast(self, buckets: Collection[Bucket] | None = None) -> None:
        """Wait until these buckets, or all, are complete, or the caller's GPU has done all that it
        was asked so far: nothing hides what ``wait`` takes after that."""
        found = (self.works[b.number] for b in (self._buckets if buckets is None else buckets))
        works = [work for work in found if work is not None]
        self._engine.drive(works, self._gradients.device.settled().done)

    def wait(self, buckets: Collection[Bucket] | None = None) -> None:
        """Wait for these buckets, or all."""
        for bucket in self._buckets if buckets is None else buckets:
            work = self.works[bucket.number]
            if bucket.state is State.COMPLETE or work is None:
                continue
            if not work.complete:
                began = time.perf_counter()
                with span(Kind.WAIT_BEGIN, self._model, bucket.number):
                    work.wait()
                self.exposed[bucket.number] += time.perf_counter() - began
            else:
                work.wait()
            bucket.state = State.COMPLETE
        self._gradients.device.hand_back()

    def refuse_absent(self) -> None:
        """Raise GradientError if some parameter got no gradient in this backward."""
        absent = self.absent
        if not absent:
            return
        shown = ", ".join(repr(self._names[member]) for member in absent[:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise GradientError(
            f"backward gave no gradient to {shown}{more}: the loss does not depend on them. Pass "
            "find_unused_parameters=True to DataParallel if that may happen, freeze parameters "
            "that never take part with requires_grad_(False), or add 0 * parameter.sum() to the "
            "loss. (With activation checkpointing, pass use_reentrant=False.)"
        )

    def describe(self) -> str:
        """This model's backward in words, for the watchdog's thread."""
        if not self.backwards:
            return f"model {self._model} has begun no backward yet"
        open_ = [self._in_words(bucket) for bucket in self._buckets if not self._is_over(bucket)]
        if not open_:
            return f"model {self._model} has ended backward {self.backwards}"
        more = f" and {len(open_) - 4} more buckets" if len(open_) > 4 else ""
        return f"model {self._model} is in backward {self.backwards}: {', '.join(open_[:4])}{more}"

    def _is_over(self, bucket: Bucket) -> bool:
        work = self.works[bucket.number]
        return bucket.state is State.COMPLETE or (work is not None and work.complete)

    def _in_words(self, bucket: Bucket) -> str:
        missing = [self._names[member] for member in bucket.members if not self._came[member]]
        if missing:
            return f"bucket {bucket.number} lacks the gradients of {quoted(missing)}"
        members = quoted([self._names[member] for member in bucket.members])
        return f"bucket {bucket.number} ({members}) is {bucket.state.value}"
