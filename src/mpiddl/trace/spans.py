"""What lasted how long on a rank, made of events that mark beginnings and ends."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpiddl.observe.event_words import quoted
from mpiddl.observe.events import Event, Kind

__all__ = ["Span", "Step", "spans_of", "steps_of"]


@dataclass
class Span:
    """Something that lasted.

    Attributes:
        name: forward, backward, wait; of a bucket: filling, ready, in flight.
        rank: Whose.
        begin: Nanoseconds.
        end: Nanoseconds.
        model: Its number.
        bucket: Its number; None for what the main thread does.
        step: The number of the backward that it belongs to; None if unknown.
        nbytes: Of the bucket.
        parameters: In the bucket, for people; unknown before buckets were last planned.
        open: It had not ended when the recording did.
    """

    name: str
    rank: int
    begin: int
    end: int
    model: int = 0
    bucket: int | None = None
    step: int | None = None
    nbytes: int = 0
    parameters: str = ""
    open: bool = False

    def args(self) -> dict[str, Any]:
        """What Chrome's format has no field for."""
        kept = ("model", "bucket", "step", "nbytes", "parameters", "open")
        return {name: value for name in kept if (value := getattr(self, name)) not in (None, "")}

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Span:
        """Back from Chrome's format."""
        begin = round(event["ts"] * 1e3)
        args = {name: event["args"][name] for name in cls.__annotations__ if name in event["args"]}
        end = begin + round(event["dur"] * 1e3)
        return cls(str(event["name"]), int(event["pid"]), begin, end, **args)


_MAIN = {
    Kind.FORWARD_BEGIN: "forward",
    Kind.BACKWARD_BEGIN: "backward",
    Kind.WAIT_BEGIN: "wait",
}
_STATES = {Kind.READY: "ready", Kind.IN_FLIGHT: "in flight"}


class _Builder:
    """Reads a rank's events in order and keeps what has begun."""

    def __init__(self, about: Mapping[str, Any], plans: Iterable[int]) -> None:
        self._about = about
        self._rank = about.get("rank", 0)
        self._open: dict[tuple[object, ...], list[Span]] = {}
        self._replans = collections.Counter(plans)  # of each model, those to come
        self._steps: dict[int, int] = {}  # the running or last backward of each model
        self._forwards: dict[int, list[Span]] = {}  # of the backward to come
        self.spans: list[Span] = []

    def take(self, event: Event) -> None:
        kind = Kind(event.kind)
        if kind is Kind.PLAN:
            self._replans[event.model] -= 1
        if kind is Kind.BACKWARD_BEGIN:
            step = event.value or self._steps.get(event.model, 0) + 1
            self._steps[event.model] = step
            for forward in self._forwards.pop(event.model, []):
                forward.step = step
        if kind in _MAIN:
            self._begin((_MAIN[kind], event.model), _MAIN[kind], event)
        elif Kind(kind - 1) in _MAIN:
            self._end((_MAIN[Kind(kind - 1)], event.model), event)
        elif kind in (*_STATES, Kind.COMPLETE):
            self._end((event.model, event.subject), event)
            if kind in _STATES:
                self._begin((event.model, event.subject), _STATES[kind], event, event.subject)
        if kind is Kind.BACKWARD_BEGIN:
            for bucket in range(len(self._model(event).get("buckets", ()))):
                self._begin((event.model, bucket), "filling", event, bucket)

    def _model(self, event: Event) -> Mapping[str, Any]:
        if self._replans[event.model]:  # what is described are the last buckets
            return {}
        found: Mapping[str, Any] = self._about.get("models", {}).get(str(event.model), {})
        return found

    def _begin(
        self, key: tuple[object, ...], name: str, event: Event, bucket: int | None = None
    ) -> None:
        span = Span(name, self._rank, event.at, event.at, event.model, bucket, open=True)
        span.step = self._steps.get(event.model)
        if name == "forward":
            span.step = None
            self._forwards.setdefault(event.model, []).append(span)
        if bucket is not None:
            model = self._model(event)
            buckets, names = model.get("buckets", ()), model.get("names", ())
            if bucket < len(buckets):
                span.nbytes = buckets[bucket]["nbytes"]
                span.parameters = quoted([names[each] for each in buckets[bucket]["members"]])
        if event.kind == Kind.IN_FLIGHT:
            span.nbytes = event.value
        self._open.setdefault(key, []).append(span)
        self.spans.append(span)

    def _end(self, key: tuple[object, ...], event: Event) -> None:
        begun = self._open.get(key)
        if begun:  # else its beginning was overwritten
            span = begun.pop()
            span.end, span.open = event.at, False

    def finish(self, last: int) -> None:
        for begun in self._open.values():
            for span in begun:
                span.end = last


def spans_of(events: Sequence[Event], about: Mapping[str, Any]) -> list[Span]:
    """A rank's spans, in the order in which they began.

    Args:
        events: Oldest first.
        about: The recording's description.
    """
    builder = _Builder(about, (event.model for event in events if event.kind == Kind.PLAN))
    for event in events:
        builder.take(event)
    if events:
        builder.finish(events[-1].at)
    return builder.spans


@dataclass
class Step:
    """One backward of one model on one rank, with the forwards before it.

    Attributes:
        rank: Whose.
        model: Its number.
        number: Of the backward, from 1.
        main: What the main thread did: forward, backward, wait.
        buckets: Their spans in flight.
    """

    rank: int
    model: int
    number: int
    main: list[Span] = field(default_factory=list)
    buckets: list[Span] = field(default_factory=list)

    @property
    def begin(self) -> int:
        """Where it began, in nanoseconds."""
        return min(span.begin for span in self.main)

    @property
    def end(self) -> int:
        """Where it ended, in nanoseconds."""
        return max(span.end for span in (*self.main, *self.buckets))

    @property
    def computed(self) -> int:
        """Where backward had nothing more to compute: the first wait, or its end."""
        waits = [span.begin for span in self.main if span.name == "wait"]
        return min(waits, default=self.end)

    @property
    def exposed_seconds(self) -> float:
        """In which the main thread waited."""
        return sum(span.end - span.begin for span in self.main if span.name == "wait") / 1e9

    @property
    def hidden_share(self) -> float:
        """The share of the bytes that were over before backward had nothing more to compute.

        Of a bucket that was in flight at that moment the part counts by time.
        """
        done, total = 0.0, 0
        for span in self.buckets:
            total += span.nbytes
            lasted = max(1, span.end - span.begin)
            done += span.nbytes * min(1.0, max(0.0, (self.computed - span.begin) / lasted))
        return done / total if total else 1.0


def steps_of(spans: Iterable[Span]) -> list[Step]:
    """Steps that are whole, by model, number and rank."""
    steps: dict[tuple[int, int, int], Step] = {}
    cut = set()
    for span in spans:
        if span.step is None or span.name in ("filling", "ready"):
            continue
        key = (span.model, span.step, span.rank)
        step = steps.setdefault(key, Step(span.rank, span.model, span.step))
        (step.main if span.bucket is None else step.buckets).append(span)
        if span.open:
            cut.add(key)
    whole = {
        key: step
        for key, step in steps.items()
        if key not in cut and any(span.name == "backward" for span in step.main)
    }
    return [whole[key] for key in sorted(whole)]
