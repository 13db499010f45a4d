"""``mpiddl data report``: what it prints, draws and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from mpiddl.cli.data import report
from mpiddl.errors import MpiddlError

REPORT = ["python", "-m", "mpiddl", "data", "report"]
LABELS = [0] * 30 + [1] * 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With labels.npy and times.json."""
    pytest.importorskip("matplotlib")
    numpy.save(tmp_path / "labels.npy", numpy.array(LABELS))
    numpy.save(tmp_path / "groups.npy", numpy.array(["a", "b"] * 20))
    numpy.save(tmp_path / "scalar.npy", numpy.array(3))
    numpy.save(tmp_path / "square.npy", numpy.ones((2, 2), dtype=int))
    write_times(tmp_path / "times.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_times(path, **changes):
    rounds = [
        {"step": 10, "shares": [0.5, 0.5], "seconds": [0.03, 0.01]},
        {"step": 20, "shares": [0.4, 0.6], "seconds": [0.025, 0.012]},
        {"step": 30, "shares": [0.25, 0.75], "seconds": [0.016, 0.014]},
    ]
    path.write_text(
        json.dumps({"format": "mpiddl-balance-1", "ranks": 2, "rounds": rounds, **changes})
    )


def test_a_report_of_both(start, folder):
    options = ["--labels", folder / "labels.npy", "--ranks", "2", "--times", folder / "times.json"]
    job = start(None, [*REPORT, *map(str, options), "-o", str(folder / "a.svg")])

    assert (job.status, job.err) == (0, ""), job.both
    assert job.out.splitlines() == [
        "contiguous sharding of 40 samples over 2 ranks",
        "rank  samples  distance       0      1",
        "   0       20     0.250  100.0%   0.0%",
        "   1       20     0.250   50.0%  50.0%",
        " all       40             75.0%  25.0%",
        "furthest from the data set's mix of classes: rank 0, 0.250",
        "slowest rank's step: 30 ms, then 16 ms",
        f"written to {folder / 'a.svg'}",
    ]
    drawn = (folder / "a.svg").read_text()
    for text in ("40 samples: 20 to 20 on a rank", "shares: 50.0 to 50.0%, then 25.0 to 75.0%"):
        assert f"<!-- {text} -->" in drawn


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "error: nothing to report: pass --labels"),
        (["--weights", "1,-1"], "'1,-1' is no list of positive numbers"),
    ],
)
def test_a_refusal_is_one_message(start, options, words):
    job = start(None, [*REPORT, *options])
    assert (job.status, job.out) == (2, "")
    assert words in job.err
    assert "Traceback" not in job.err


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("stratified", {}, ["20 0.000 75.0% 25.0%"] * 2),
        ("strided", {}, ["20 0.000 75.0% 25.0%"] * 2),
        ("grouped", {"groups": Path("groups.npy")}, ["20 0.000 75.0% 25.0%"] * 2),
        ("balanced", {}, ["20 0.000 50.0% 50.0%"] * 2),
        ("weighted", {"weights": "3,1"}, ["30 ", "10 "]),
        ("random", {"seed": 5}, ["20 ", "20 "]),
        ("hash", {"keys": Path("same.npy")}, [("40 ", "0 "), ("0 ", "40 ")]),
    ],
)
def test_shardings(folder, capsys, name, options, rows):
    numpy.save("same.npy", numpy.zeros(40, dtype=int))  # one key: all on one rank
    report(Path("labels.npy"), name, 2, output=Path("a.svg"), **options)

    found = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:4]]
    for rank, (row, start) in enumerate(zip(found, rows, strict=True)):
        assert row.removeprefix(f"{rank} ").startswith(start), found


def test_the_seed_counts(folder, capsys):
    for seed in (1, 2, 1):
        report(Path("labels.npy"), "random", 2, seed, output=Path("a.svg"))
    first, second, again = capsys.readouterr().out.split("written to a.svg\n")[:3]
    assert first == again != second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "labels.npy"}, "pass --ranks"),
        ({"labels": "no.npy", "ranks": 2}, "no.npy"),
        ({"labels": "square.npy", "ranks": 2}, "one dimension"),
        ({"labels": "scalar.npy", "ranks": 2}, r"one dimension, got shape \(\)"),
        ({"labels": "labels.npy", "ranks": 2, "sharding": "sorted"}, "'sorted' is no sharding"),
        (
            {"labels": "labels.npy", "ranks": 2, "sharding": "weighted", "weights": "1,1,1"},
            "3 weights for 2 ranks",
        ),
        ({"labels": "labels.npy", "ranks": 2, "groups": "groups.npy"}, "takes no groups"),
        ({"times": "no.json"}, "no.json cannot be read: No such file"),
        ({"times": "labels.npy"}, "labels.npy is no file of mpiddl.data.Balancer.save"),
        ({"times": "broken.json"}, "broken.json is no file of mpiddl.data.Balancer.save"),
        ({"times": "list.json"}, "list.json is no file of mpiddl.data.Balancer.save"),
        ({"times": "other.json"}, "its format is 'mpiddl-bench-1'"),
        ({"times": "none.json"}, "rounds or names are missing"),
        ({"times": "few.json"}, "it has not a number for each rank"),
        ({"times": "times.json", "output": "a.gif"}, "a.gif cannot be drawn"),
        ({"times": "times.json", "output": "no/a.png"}, "cannot be written: No such file"),
    ],
)
def test_what_is_refused(folder, options, words):
    write_times(folder / "other.json", format="mpiddl-bench-1")
    write_times(folder / "none.json", rounds=[])
    write_times(folder / "few.json", ranks=3)
    (folder / "broken.json").write_text('{"format": ')
    (folder / "list.json").write_text("[1, 2]")
    names = ("labels", "times", "groups", "output")
    given = {key: Path(value) if key in names else value for key, value in options.items()}
    with pytest.raises(MpiddlError, match=words):
        report(**given)
