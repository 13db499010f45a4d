"""From events to spans, steps, Chrome's format and a picture."""

from __future__ import annotations

import json

import pytest
import torch

from mpiddl.errors import RecordingError
from mpiddl.observe.event_files import EventFile, read
from mpiddl.observe.events import EVENT, Event, Kind, recorder
from mpiddl.observe.spans import span
from mpiddl.trace.chrome import lines_of, merge, read_folder, read_trace
from mpiddl.trace.spans import spans_of, steps_of
from mpiddl.trace.timeline import choose_steps, plot_timeline

MS = 1_000_000
BUCKETS = [{"members": [1], "nbytes": 300, "tag": 5}, {"members": [0], "nbytes": 100, "tag": 6}]
MODELS = {"1": {"names": ["first", "second"], "buckets": BUCKETS}}

# Milliseconds, kind, subject, value. Bucket 0 flies while backward computes, bucket 1 in the wait.
STEP = [
    (0, Kind.FORWARD_BEGIN, -1, 0),
    (10, Kind.FORWARD_END, -1, 0),
    (12, Kind.BACKWARD_BEGIN, -1, 1),
    (13, Kind.GRADIENT, 1, 0),
    (14, Kind.READY, 0, 1),
    (15, Kind.IN_FLIGHT, 0, 300),
    (16, Kind.CHUNK, 5, 300),
    (20, Kind.COMPLETE, 0, 300),
    (30, Kind.READY, 1, 0),
    (30, Kind.IN_FLIGHT, 1, 100),
    (30, Kind.WAIT_BEGIN, -1, 0),
    (36, Kind.COMPLETE, 1, 100),
    (36, Kind.WAIT_END, -1, 0),
    (37, Kind.BACKWARD_END, -1, 1),
]


def write(folder, rank, events, **facts):
    """A recording as rank ``rank`` would have made it, its clock 1 s behind for every rank."""
    file = EventFile(folder / f"rank-{rank}.events")
    file.describe(
        {
            "job": "j",
            "rank": rank,
            "size": 2,
            "host": f"h{rank}",
            "clock": {"offset": rank * 1000 * MS},
            "models": MODELS,
            **facts,
        }
    )
    content = bytearray(file.path.read_bytes())
    start = len(content) - 1000 * EVENT.size
    for number, (at, kind, subject, value) in enumerate(events, 1):
        at = at * MS + (5000 - rank * 1000) * MS
        EVENT.pack_into(content, start + number * EVENT.size, at, kind, 1, subject, value, number)
    file.path.write_bytes(content)
    return read(file.path)


def durations(spans, name):
    return [(span.bucket, (span.end - span.begin) / MS) for span in spans if span.name == name]


def events_of(recording):
    return [Event(*event) for event in recording.events.tolist()]


def test_spans_and_steps(tmp_path):
    recording = write(tmp_path, 0, STEP)
    spans = spans_of(events_of(recording), recording.about)

    assert durations(spans, "forward") == [(None, 10)]
    assert durations(spans, "backward") == [(None, 25)]
    assert durations(spans, "wait") == [(None, 6)]
    assert durations(spans, "filling") == [(0, 2), (1, 18)]
    assert durations(spans, "ready") == [(0, 1), (1, 0)]
    assert durations(spans, "in flight") == [(0, 5), (1, 6)]
    assert {span.step for span in spans} == {1}
    assert [span.parameters for span in spans if span.name == "in flight"] == [
        "'second'",
        "'first'",
    ]

    (step,) = steps_of(spans)
    assert step.exposed_seconds == 0.006
    assert step.hidden_share == 0.75
    assert (step.end - step.begin) / MS == 37


def test_buckets_that_were_planned_anew_since_are_not_those_that_are_described(tmp_path):
    again = [(at + 100, *rest) for at, *rest in STEP]
    recording = write(tmp_path, 0, [(0, Kind.PLAN, 3, 400), *STEP, (99, Kind.PLAN, 2, 400), *again])
    spans = [s for s in spans_of(events_of(recording), recording.about) if s.name == "in flight"]

    assert [span.parameters for span in spans] == ["", "", "'second'", "'first'"]
    assert [span.nbytes for span in spans] == 2 * [300, 100]


def test_what_was_cut_is_no_step_but_is_seen(tmp_path):
    recording = write(tmp_path, 0, STEP[4:-3])  # a ring that has lost the start; a killed rank
    spans = spans_of(events_of(recording), recording.about)

    assert durations(spans, "in flight") == [(0, 5), (1, 0)]
    assert [span.open for span in spans if span.name == "wait"] == [True]
    assert steps_of(spans) == []
    killed = write(tmp_path, 0, STEP[:-2])
    assert steps_of(spans_of(events_of(killed), killed.about)) == []


def test_merge_aligns_clocks_and_plot_reads_it(tmp_path):
    for rank in (1, 0):
        write(tmp_path, rank, STEP)
    merged = merge(read_folder(tmp_path))

    spans = [event for event in merged["traceEvents"] if event["ph"] == "X"]
    by_rank = [[event for event in spans if event["pid"] == rank] for rank in (0, 1)]
    assert [event["ts"] for event in by_rank[0]] == [event["ts"] for event in by_rank[1]]
    assert by_rank[0][0]["ts"] == 0
    assert {"M", "X", "i", "C"} == {event["ph"] for event in merged["traceEvents"]}
    names = [event["args"] for event in merged["traceEvents"] if event["ph"] == "M"]
    rows = [name["name"] for name in names if "name" in name]
    assert {"rank 1 (h1)", "main thread", "model 1, bucket 1"} <= set(rows)
    chunk = next(event for event in merged["traceEvents"] if event["name"] == "chunk")
    flight = next(event for event in spans if event["name"] == "in flight")
    assert (chunk["tid"], chunk["args"]) == (flight["tid"], {"bytes": 300})

    file = tmp_path / "run.json"
    file.write_text(json.dumps(merged))
    steps = choose_steps(read_trace(file))
    assert [(step.rank, step.number, step.exposed_seconds) for step in steps] == [
        (0, 1, 0.006),
        (1, 1, 0.006),
    ]
    plot_timeline(tmp_path / "run.png", steps)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RecordingError, match="no step 9; it has 1"):
        choose_steps(read_trace(file), [9])


def test_lines_for_people(tmp_path):
    write(tmp_path, 0, STEP)
    text = "\n".join(lines_of(read_folder(tmp_path), 3))

    assert "rank 0 of 2 on h0: 14 events" in text
    assert "last  ended backward 1" in text
    assert "-1 ms  bucket 1 ('first') is complete" in text
    assert "forward" not in text


def test_mistakes_are_clear(tmp_path):
    with pytest.raises(RecordingError, match="holds no recording"):
        read_folder(tmp_path)
    recordings = [write(tmp_path, 0, STEP), write(tmp_path, 1, STEP, job="another")]
    with pytest.raises(RecordingError, match="different jobs"):
        merge(recordings)
    file = tmp_path / "run.json"
    for text, words in [("{", "not JSON"), ("[]", "not a trace"), ('{"a": 1}', "not a trace")]:
        file.write_text(text)
        with pytest.raises(RecordingError, match=words):
            read_trace(file)
    with pytest.raises(RecordingError, match="no whole step"):
        choose_steps([])


def test_a_span_is_a_range_for_the_profiler():
    begun, ended = recorder.latest[Kind.WAIT_BEGIN], recorder.latest[Kind.WAIT_END]
    with torch.profiler.profile() as profile, span(Kind.WAIT_BEGIN, 1, 3):
        pass
    with span(Kind.WAIT_BEGIN, 1, 4):
        pass

    names = [event.name for event in profile.events()]
    assert [name for name in names if "mpiddl" in name] == ["mpiddl.wait(bucket 3)"]
    assert recorder.latest[Kind.WAIT_BEGIN] > begun
    assert recorder.latest[Kind.WAIT_END] > ended
    assert [event.subject for event in recorder.last(4)] == [4, 4, 3, 3]
