"""Risks from a table: embedded, and a user's."""

from __future__ import annotations

import csv

import pytest
from training_jobs import forget_all_but_the_first_checkpoint, module, program, rows


def auc_in(path):
    """Of a file of scores, by somebody else's code."""
    from sklearn.metrics import roc_auc_score

    with open(path) as lines:
        scores = list(csv.DictReader(lines))
    return roc_auc_score([int(s["label"]) for s in scores], [float(s["risk"]) for s in scores])


def test_defaults_reach_the_auc(start, tmp_path):
    job = start(2, program("risk", "--out", tmp_path))
    assert job.status == 0, job.both
    assert job.err == ""
    assert rows(tmp_path)[-1]["AUC"] >= 0.98
    assert auc_in(tmp_path / "scores.csv") >= 0.98
    assert f"test AUC {auc_in(tmp_path / 'scores.csv'):.4f}" in job.out


@pytest.mark.by_day(0)
def test_it_goes_on_in_mid_epoch(start, tmp_path):
    """398 rows in batches of 32: an epoch has 13 steps."""
    command = program("risk", "--out", tmp_path, "--checkpoint-every", "20", "--keep", "99")
    assert start(2, command).status == 0
    whole = (tmp_path / "model.safetensors").read_bytes()

    assert forget_all_but_the_first_checkpoint(tmp_path) == 20
    job = start(2, command, "--resume")

    assert job.status == 0, job.both
    assert "goes on after step 20, in epoch 2" in job.out
    assert (tmp_path / "model.safetensors").read_bytes() == whole


def table(path, count, spoil=None):
    """Of each eight patients one died, most of them with a high second value."""
    lines = [
        ["a", "b", "outcome"],
        *(
            [k % 7, k % 10 + 9 * (k % 8 == 0), "died" if k % 8 == 0 else "well"]
            for k in range(count)
        ),
    ]
    if spoil is not None:
        line, column, text = spoil
        lines[line][column] = text
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return path


@pytest.mark.by_day(0)
def test_a_table_of_a_user_is_the_same_on_one_and_three_ranks(start, tmp_path):
    flags = ["--data", table(tmp_path / "p.csv", 400), "--label", "outcome", "--batch-size", "25"]
    for ranks in (1, 3):
        command = program("risk", *flags, "--epochs", "20", "--lr", "0.01")
        job = start(ranks, command, "--out", str(tmp_path / str(ranks)))
        assert job.status == 0, job.both
        assert "280 rows to train on, 12.5% died" in job.out
    assert auc_in(tmp_path / "1" / "scores.csv") >= 0.95
    with open(tmp_path / "1" / "scores.csv") as one, open(tmp_path / "3" / "scores.csv") as three:
        for alone, together in zip(csv.DictReader(one), csv.DictReader(three), strict=True):
            assert alone["row"] == together["row"]
            assert float(alone["risk"]) == pytest.approx(float(together["risk"]), abs=1e-3)


@pytest.mark.by_day(0)
def test_a_value_that_is_missing_is_one_error(start, tmp_path):
    path = table(tmp_path / "p.csv", 80, spoil=(5, 1, "nan"))
    flags = ["--data", path, "--label", "outcome", "--out", tmp_path / "out"]
    job = start(2, program("risk", *flags))

    assert job.status == 2
    assert job.both.count("'b' is nan in row 5 after the header") == 1, job.both
    assert "Traceback" not in job.both


@pytest.mark.parametrize(
    ("count", "spoil", "options", "words"),
    [
        (80, (3, 2, "moved"), {}, "must have two classes, it has 3: died, moved, well"),
        (80, None, {"positive": "cured"}, "the classes are died and well"),
        (80, None, {"label": "result"}, "has no column 'result'"),
        (80, (3, 0, "x"), {}, "line 4, column 'a': 'x' is not a number"),
        (80, (3, 0, "-inf"), {}, "'a' is -inf in row 3"),
        (80, (3, 0, "1e39"), {}, "'a' is 1e+39 in row 3"),
        (9, None, {}, "are too few"),
        (0, None, {}, "has no rows"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, count, spoil, options, words):
    risk = module("risk")
    path = table(tmp_path / "p.csv", count, spoil)
    with pytest.raises(ValueError, match=r".") as caught:
        risk.load(risk.Flags(data=path, **{"label": "outcome", **options}))
    assert words in str(caught.value)


def test_the_positive_class_is_what_was_asked_for_else_the_rarer(tmp_path):
    risk = module("risk")
    path = table(tmp_path / "p.csv", 80)
    for options, name, share in (({}, "died", 1 / 8), ({"positive": "well"}, "well", 7 / 8)):
        found = risk.load(risk.Flags(data=path, label="outcome", **options))
        assert (found.positive, found.labels.mean()) == (name, share)
        assert sorted(row for part in found.parts for row in part) == list(range(80))
