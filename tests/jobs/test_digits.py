"""The job that a newcomer runs first."""

from __future__ import annotations

import json

import pytest

DIGITS = ["python", "jobs/digits.py"]


def test_defaults_reach_the_accuracy(start, tmp_path):
    job = start(2, [*DIGITS, "--out", str(tmp_path)])

    assert job.status == 0, job.both
    assert job.err == ""
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 21))
    assert rows[-1]["test_accuracy"] >= 0.97
    assert all(0 <= row["exposed_share"] < 1 and row["samples_per_second"] > 0 for row in rows)
    assert job.out.count("epoch ") == 20
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) >= {"0.weight", "9.bias"}


@pytest.mark.by_day(0)
@pytest.mark.parametrize("algorithm", ["ring", "library"])
def test_an_uneven_last_batch_on_three_ranks(start, tmp_path, algorithm):
    """1,437 images in batches of 359: the last has one image, and two ranks have none."""
    arguments = ["--epochs", "2", "--batch-size", "359", "--algorithm", algorithm]
    job = start(3, [*DIGITS, *arguments, "--out", str(tmp_path)])

    assert job.status == 0, job.both
    assert "replicas bitwise equal" in job.out


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--out", "/proc/none"], "cannot write"),
        (["--turbo"], "No such option"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_get_one_clear_message(start, flags, words):
    job = start(2, [*DIGITS, *flags])

    assert job.status == 2
    assert job.both.count("Usage:") == 1
    assert words in " ".join(job.both.split())
    assert "Traceback" not in job.both
