"""From the ranks' files of events to one trace in Chrome's format, which Perfetto reads too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpiddl.base.units import format_seconds
from mpiddl.errors import RecordingError
from mpiddl.observe.event_files import Recording, read
from mpiddl.observe.event_words import in_words
from mpiddl.observe.events import Event, Kind
from mpiddl.trace.spans import Span, spans_of

__all__ = ["lines_of", "merge", "read_folder", "read_trace"]

FORMAT = "mpiddl trace 1"
MAIN_ROW = 0
_INSTANTS = (Kind.GRADIENT, Kind.STEP, Kind.PLAN)


def read_folder(path: Path) -> list[Recording]:
    """The recordings in a folder, or in one file, in the order of ranks.

    Raises:
        RecordingError: There are none, or one cannot be read.
    """
    paths = sorted(path.glob("rank-*.events")) if path.is_dir() else [path]
    if not paths:
        raise RecordingError(
            f"{path} holds no recording (rank-*.events); a job writes them with MPIDDL_TRACE={path}"
        )
    recordings = [read(each) for each in paths]
    return sorted(recordings, key=lambda recording: recording.about.get("rank", 1 << 30))


def lines_of(recordings: Sequence[Recording], length: int) -> Iterable[str]:
    """The last events of every rank, for people."""
    for recording in recordings:
        about = recording.about
        known = (
            f"rank {about.get('rank', '?')} of {about.get('size', '?')} on {about.get('host', '?')}"
        )
        lost = f", {recording.lost} older ones overwritten" if recording.lost else ""
        yield f"{known}: {len(recording.events)} events{lost} ({recording.path})"
        yield from (f"  note: {problem}" for problem in recording.problems)
        shown = [Event(*event) for event in recording.events[-length:].tolist()]
        for event in shown:
            before = (shown[-1].at - event.at) / 1e9
            when = f"-{format_seconds(before)}" if before else "last"
            yield f"  {when:>10}  {in_words(event, about)}"


def merge(recordings: Sequence[Recording]) -> dict[str, Any]:
    """One trace of all ranks, on rank 0's clock.

    Raises:
        RecordingError: They are not of one job, or a description is missing.
    """
    jobs = {}
    for recording in recordings:
        if "rank" not in recording.about:
            raise RecordingError(f"{recording.path}: its description is missing; leave it out")
        jobs[recording.about.get("job")] = recording.path
    if len(jobs) > 1:
        raise RecordingError(
            f"recordings of different jobs: {', '.join(map(str, jobs.values()))}; trace each job "
            "into a folder of its own"
        )
    starts = [_aligned(recording, recording.events["at"][:1]) for recording in recordings]
    start = min((int(first[0]) for first in starts if len(first)), default=0)
    first = recordings[0].about
    return {
        "traceEvents": [
            event for recording in recordings for event in _events_of(recording, start)
        ],
        "displayTimeUnit": "ms",
        "otherData": {
            "format": FORMAT,
            "job": first.get("job"),
            "ranks": len(recordings),
            "size": first.get("size"),
            "versions": first.get("versions"),
            "problems": [
                f"{each.path.name}: {text}" for each in recordings for text in each.problems
            ],
        },
    }


def _aligned(recording: Recording, at: Any) -> Any:
    return at + recording.about.get("clock", {}).get("offset", 0)


def _events_of(recording: Recording, start: int) -> Iterable[dict[str, Any]]:
    """What a rank did, in Chrome's words."""
    about = recording.about
    rank = about["rank"]
    name = f"rank {rank} ({about.get('host')})"
    yield _meta("process_name", rank, MAIN_ROW, name=name)
    yield _meta("process_sort_index", rank, MAIN_ROW, sort_index=rank)
    yield _meta("thread_name", rank, MAIN_ROW, name="main thread")
    shift = _aligned(recording, 0) - start
    events = [Event(*event) for event in recording.events.tolist()]
    yield from _bars(events, about, shift)
    yield from _points(events, about, shift)


def _bars(
    events: Sequence[Event], about: Mapping[str, Any], shift: int
) -> Iterable[dict[str, Any]]:
    """What lasted, each bucket in a row of its own."""
    rows = {MAIN_ROW}
    for span in spans_of(events, about):
        row = _row_of(span)
        if row not in rows:
            rows.add(row)
            name = f"model {span.model}, bucket {span.bucket}"
            yield _meta("thread_name", span.rank, row, name=name)
        yield {
            "ph": "X",
            "name": span.name,
            "pid": span.rank,
            "tid": row,
            "ts": (span.begin + shift) / 1e3,
            "dur": (span.end - span.begin) / 1e3,
            "args": span.args(),
        }


def _points(
    events: Sequence[Event], about: Mapping[str, Any], shift: int
) -> Iterable[dict[str, Any]]:
    """What happened at one moment, and how many bytes were in flight then."""
    in_flight = 0
    for event in events:
        at = {"pid": about["rank"], "ts": (event.at + shift) / 1e3}
        if event.kind in _INSTANTS:
            yield {"ph": "i", "s": "t", "name": in_words(event, about), "tid": MAIN_ROW, **at}
        elif event.kind == Kind.CHUNK:
            row, args = _row_of_tag(event.subject, about), {"bytes": event.value}
            yield {"ph": "i", "s": "t", "name": "chunk", "tid": row, "args": args, **at}
        elif event.kind in (Kind.IN_FLIGHT, Kind.COMPLETE):
            in_flight += event.value if event.kind == Kind.IN_FLIGHT else -event.value
            yield {"ph": "C", "name": "bytes in flight", "args": {"bytes": max(0, in_flight)}, **at}


def _meta(what: str, rank: int, row: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": row, "args": args}


def _row_of(span: Span) -> int:
    return MAIN_ROW if span.bucket is None else span.model * 10_000 + span.bucket


def _row_of_tag(tag: int, about: Mapping[str, Any]) -> int:
    for number, model in about.get("models", {}).items():
        for bucket, facts in enumerate(model.get("buckets", ())):
            if facts.get("tag") == tag:
                return int(number) * 10_000 + bucket
    return MAIN_ROW


def read_trace(path: Path) -> list[Span]:
    """The spans of what ``merge`` made, times in nanoseconds from its start.

    Args:
        path: A file that holds it, or a folder of recordings, which are merged.

    Raises:
        RecordingError: It is no such file.
    """
    try:
        content = merge(read_folder(path)) if path.is_dir() else json.loads(path.read_text())
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None
    except RecordingError:
        raise
    except ValueError:
        raise RecordingError(f"{path} is not JSON; make it with `mpiddl trace merge`") from None
    try:
        if content["otherData"]["format"] != FORMAT:
            raise KeyError
        return [Span.of(event) for event in content["traceEvents"] if event["ph"] == "X"]
    except (KeyError, TypeError, ValueError):
        raise RecordingError(
            f"{path} is not a trace of mpiddl; make it with `mpiddl trace merge`"
        ) from None
