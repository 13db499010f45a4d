"""What ``mpiddl tune`` concludes from its measurements, and its file."""

from __future__ import annotations

import json
import logging

import pytest

from mpiddl.bench.bandwidth import Row
from mpiddl.bench.tune import choices_of
from mpiddl.comm import tuning
from mpiddl.comm.layout import Layout
from mpiddl.comm.tuning import (
    Choice,
    cluster_name,
    read_choices,
    read_training,
    tune_file,
    write_choices,
    write_training,
)
from mpiddl.strategies.calibration import fastest


def layout(*nodes):
    firsts = tuple(ranks[0] for ranks in nodes)
    return Layout(0, 0, len(nodes[0]), 0, len(nodes), 1, 1, False, nodes, firsts)


LAYOUT = layout((0, 1), (2,))
CLUSTER = "Open MPI v5, 2x1-2 ranks, cpu"
CHOICES = [Choice(16384, "doubling", 1 << 19), Choice(None, "ring", 1 << 20)]


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    """Naming the cluster asks for the MPI library's name; these tests run without one."""
    monkeypatch.setattr(tuning.library, "describe", lambda: {"library": "Open MPI v5"})
    monkeypatch.setattr(tuning, "_warned", set())


def row(nbytes, way, seconds):
    return Row("all-reduce", way, "empty", nbytes, "float32", "sum", 2, seconds, seconds, 1, 1, 0)


def test_the_fastest_for_each_size_and_borders_between():
    rows = [
        *(row(1 << 10, "doubling/1", 1.0), row(1 << 10, "ring/1", 2.0), row(1 << 10, "ring/2", 3)),
        *(row(1 << 14, "doubling/1", 4.0), row(1 << 14, "ring/1", 5.0), row(1 << 14, "ring/2", 6)),
        *(row(1 << 20, "doubling/1", 9.0), row(1 << 20, "ring/1", 8.0), row(1 << 20, "ring/2", 4)),
    ]
    assert choices_of(rows) == [Choice(1 << 17, "doubling", 1), Choice(None, "ring", 2)]


def test_a_way_is_left_only_for_a_clear_gain():
    rows = [row(1, "ring/1", 1.0), row(1, "direct/1", 2.0)]
    rows += [row(64, "ring/1", 1.05), row(64, "direct/1", 1.0)]
    assert choices_of(rows) == [Choice(None, "ring", 1)]


def test_clusters_have_names():
    assert cluster_name(LAYOUT) == CLUSTER
    assert cluster_name(layout((0, 1, 2, 3))) == "Open MPI v5, 1x4 ranks, cpu"


def test_what_was_written_is_read_and_other_clusters_stay(tmp_path):
    file = tmp_path / "new" / "tune.json"
    write_choices(file, "other", "2026-01-01", CHOICES[1:])
    write_choices(file, CLUSTER, "2026-01-02", CHOICES)

    assert read_choices(str(file), LAYOUT) == CHOICES
    assert set(json.loads(file.read_text())["clusters"]) == {CLUSTER, "other"}
    assert [path.name for path in file.parent.iterdir()] == ["tune.json"]
    assert read_choices(str(file), layout((0,))) == []


def test_a_broken_file_is_replaced(tmp_path):
    file = tmp_path / "tune.json"
    file.write_text("{")
    write_choices(file, CLUSTER, "2026-01-02", CHOICES)
    assert read_choices(str(file), LAYOUT) == CHOICES


def entry(**changes):
    choice = {"up_to": None, "algorithm": "ring", "chunk_bytes": 1024, **changes}
    return {"mpiddl_tune": 1, "clusters": {CLUSTER: {"choices": [choice]}}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x80",
        '{"clusters": {}}',
        json.dumps({**entry(), "mpiddl_tune": 2}),
        json.dumps(entry(algorithm="warp")),
        json.dumps(entry(algorithm="auto")),
        json.dumps(entry(chunk_bytes=0)),
        json.dumps(entry(chunk_bytes="many")),
        json.dumps(entry(up_to=5)),
        json.dumps({"mpiddl_tune": 1, "clusters": {CLUSTER: {"choices": []}}}),
        json.dumps({"mpiddl_tune": 1, "clusters": {CLUSTER: []}}),
        json.dumps({"mpiddl_tune": 1, "clusters": []}),
    ],
)
def test_a_corrupt_or_foreign_file_is_ignored_with_one_warning(tmp_path, caplog, text):
    file = tmp_path / "tune.json"
    file.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING, "mpiddl"):
        assert read_choices(str(file), LAYOUT) == []
        assert read_choices(str(file), LAYOUT) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "run `mpiddl tune`" in caplog.text


def test_where_the_file_is(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune_file("") == tmp_path / "mpiddl" / "tune.json"
    assert tune_file("/a/b") == tune_file("/a/b")
    assert read_choices("", LAYOUT) == []
    assert not caplog.records
    assert read_choices(str(tmp_path / "named"), LAYOUT) == []
    assert "no such file" in caplog.text
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(tune_file("")) == "/home/me/.cache/mpiddl/tune.json"


def test_what_a_job_found_out_is_kept_beside_the_choices(tmp_path):
    file = tmp_path / "tune.json"
    found = {"bucket_size": 1 << 20, "engine": "thread"}
    write_training(str(file), LAYOUT, "a model", found, "cpu")
    assert read_choices(str(file), LAYOUT) == []
    write_choices(file, CLUSTER, "2026-01-02", CHOICES)
    write_training(str(file), LAYOUT, "another", {}, "cpu")

    assert read_choices(str(file), LAYOUT) == CHOICES
    assert read_training(str(file), LAYOUT, "a model", "cpu") == found
    assert read_training(str(file), LAYOUT, "unknown", "cpu") is None
    assert read_training(str(file), layout((0,)), "a model", "cpu") is None
    assert read_training(str(file), LAYOUT, "a model", "cuda") is None  # another device
    assert read_training("", LAYOUT, "a model", "cpu") is None
    file.write_text("[]")
    assert read_training(str(file), LAYOUT, "a model", "cpu") is None


def test_another_choice_must_be_clearly_faster():
    assert fastest([[1.0, 0.9, 0.5], [1.0, 1.2, 0.99]]) == 0  # by rank; the slowest counts
    assert fastest([[1.0, 0.9, 0.5], [1.0, 1.2, 0.9]]) == 2
