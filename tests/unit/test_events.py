"""Events: the ring, its file, and what readers make of torn and foreign ones."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from mpiddl.errors import RecordingError
from mpiddl.observe.event_files import EventFile, in_use, read
from mpiddl.observe.event_words import in_words, quoted
from mpiddl.observe.events import EVENT, Event, Kind, Recorder

ABOUT = {
    "rank": 2,
    "models": {"1": {"names": ["a", "b"], "buckets": [{"members": [1, 0], "nbytes": 8, "tag": 9}]}},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rank-2.events"


@pytest.fixture
def recorder(path):
    """One that writes to ``path``, a ring of ten."""
    recorder = Recorder(10)
    recorder.about = {**ABOUT}
    EventFile(path, 10).take_over(recorder)
    return recorder


def subjects(path):
    return read(path).events["subject"].tolist()


def test_a_ring_keeps_the_last_events(path, recorder):
    for subject in range(25):
        recorder.record(Kind.READY, 1, subject)

    assert [event.subject for event in recorder.last(3)] == [24, 23, 22]
    # The tenth might be half overwritten by an event that a killed process never finished.
    assert subjects(path) == list(range(16, 25))
    assert read(path).lost == 16
    assert read(path).about == ABOUT
    assert read(path).problems == []


def test_events_come_along_into_other_memory(path):
    recorder = Recorder(10)
    for subject in range(4):
        recorder.record(Kind.READY, 1, subject)

    EventFile(path, 100).take_over(recorder)
    recorder.record(Kind.COMPLETE, 1, 4)

    assert subjects(path) == [0, 1, 2, 3, 4]
    assert (recorder.latest[Kind.READY], recorder.latest[Kind.COMPLETE], recorder.count) == (
        4,
        5,
        5,
    )


def test_threads_do_not_overwrite_each_other(path):
    recorder = Recorder(10)
    EventFile(path, 50_000).take_over(recorder)

    def write(first):
        for subject in range(first, first + 5000):
            recorder.record(Kind.READY, 1, subject)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 40_000, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(subjects(path)) == list(range(40_000))


def test_a_ring_grows_as_far_as_there_is_memory(path):
    """Where the disk is full it goes on in circles in what it has."""
    recorder = Recorder(10)
    granted = iter([16, 32, 32])
    memory = bytearray(1000 * EVENT.size)
    recorder.move(memory, more=lambda _: next(granted))

    for subject in range(100):
        recorder.record(Kind.READY, 1, subject)

    assert not any(memory[32 * EVENT.size :])
    assert [event.subject for event in recorder.last(1000)] == list(range(99, 68, -1))


def test_a_torn_event_is_left_out_and_said(path, recorder):
    for subject in range(5):
        recorder.record(Kind.READY, 1, subject)
    content = bytearray(path.read_bytes())
    third = len(content) - 7 * EVENT.size
    content[third : third + EVENT.size] = EVENT.pack(1, 6, 1, 2, 0, 77)
    path.write_bytes(content)

    assert subjects(path) == [0, 1, 3, 4]
    assert read(path).problems == ["1 events are damaged and left out"]


def test_a_torn_description_leaves_the_one_before(path, recorder):
    recorder.describe(models={})
    content = path.read_bytes()
    newest = content.replace(b'"models": {}', b'"models": {,')
    assert newest != content
    path.write_bytes(newest)

    assert read(path).about == ABOUT

    path.write_bytes(newest.replace(b'"names"', b'"manes"'))
    assert read(path).about == {}
    assert "its description is missing" in read(path).problems[0]


def test_truncated_and_foreign_files(path, recorder, tmp_path):
    for subject in range(5):
        recorder.record(Kind.READY, 1, subject)
    content = path.read_bytes()

    path.write_bytes(content[: -6 * EVENT.size])
    assert subjects(path) == [0, 1, 2]
    assert "truncated" in read(path).problems[0]
    path.write_bytes(content[:5000])
    assert subjects(path) == []
    path.write_bytes(content[:8] + b"\x09" + content[9:])
    with pytest.raises(RecordingError, match="format 9, this mpiddl reads format 1"):
        read(path)
    path.write_bytes(content[:30])
    with pytest.raises(RecordingError, match="not a recording"):
        read(path)
    path.write_bytes(b"something else, and long enough to have a header")
    with pytest.raises(RecordingError, match="not a recording"):
        read(path)
    with pytest.raises(RecordingError, match="No such file"):
        read(tmp_path / "nothing")


def test_a_file_is_in_use_while_its_writer_lives(path):
    code = "import sys, pathlib, mpiddl.observe.event_files as files\n"
    code += "files.EventFile(pathlib.Path(sys.argv[1])); print('made', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        writer.stdout.readline()
        assert in_use(path)
        writer.kill()
    assert not in_use(path)
    assert read(path).problems


def test_every_kind_has_words():
    for kind in Kind:
        assert in_words(Event(0, kind, 1, 0, 1, 1), ABOUT)
    assert in_words(Event(0, Kind.READY, 1, 0, 1, 1), ABOUT) == (
        "bucket 0 ('b', 'a') became ready with 'b'"
    )
    assert in_words(Event(0, Kind.COMPLETE, 3, 8, 1, 1), {}) == "bucket 8 is complete (model 3)"
    assert in_words(Event(0, Kind.BACKWARD_BEGIN, 1, -1, 17, 1), {}) == "began backward 17"
    assert quoted(["a", "b", "c"], 2) == "'a', 'b' and 1 more"
