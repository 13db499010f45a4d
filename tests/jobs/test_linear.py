"""Regressions whose result is known."""

from __future__ import annotations

import json
import re

import numpy
import pytest
from training_jobs import forget_all_but_the_first_checkpoint, module, program, rows

SOFTMAX = ["--task", "softmax", "--lr", "0.5", "--batch-size", "300", "--epochs", "10"]


def test_defaults_reach_the_closed_form_on_four_ranks(start, tmp_path):
    job = start(4, program("linear", "--out", tmp_path))

    assert job.status == 0, job.both
    told = float(re.search(r"least-squares solution: (\S+)", job.out)[1])
    assert told < 1e-12
    linear = module("linear")
    x, y = linear.make_data(linear.Flags())
    weights = numpy.load(tmp_path / "weights.npy")
    # What lstsq solves, solved otherwise: nothing of the residual is in the inputs' span.
    residual = y - x @ weights[:-1] - weights[-1]
    assert numpy.abs(linear.with_ones(x).T @ residual).max() < 1e-9
    assert job.out.count("largest difference") == 1


@pytest.mark.by_day(0)
def test_numpy_is_as_torch_and_goes_on_in_mid_epoch(start, tmp_path):
    """Batches of 300 samples of 1,000, over three ranks, over two, and over two that stopped."""
    by_torch, by_numpy = tmp_path / "torch", tmp_path / "numpy"
    job = start(3, program("linear", *SOFTMAX, "--out", by_torch))
    assert job.status == 0, job.both
    command = program("linear", *SOFTMAX, "--numpy", "--out", by_numpy, "--checkpoint-every", "6")
    job = start(2, command, "--keep", "9")
    assert job.status == 0, job.both
    whole = (by_numpy / "weights.npy").read_bytes()
    numpy.testing.assert_allclose(
        numpy.load(by_torch / "weights.npy"), numpy.load(by_numpy / "weights.npy"), atol=1e-12
    )
    losses = [[row["loss"] for row in rows(out)] for out in (by_torch, by_numpy)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][-1] < losses[0][0] < numpy.log(5)

    assert forget_all_but_the_first_checkpoint(by_numpy) == 6
    job = start(2, command, "--resume")

    assert job.status == 0, job.both
    assert "goes on after step 6, in epoch 2" in job.out
    assert (by_numpy / "weights.npy").read_bytes() == whole


def test_a_run_without_a_result_fails_and_keeps_its_checkpoints_until_told(start, tmp_path):
    """A learning rate at which the loss overflows; then a start in the same folder, and another."""
    flags = program("linear", "--epochs", "5", "--out", tmp_path)
    job = start(2, [*flags, "--lr", "1e100"])
    assert job.status == 1, job.both
    assert job.both.count("error: NaN or infinite: loss since epoch 3") == 1
    assert job.err.count("loss of epoch 5 is nan, null in files") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines]
    assert losses[0] > 0
    assert losses[2:] == [None, None, None]

    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    job = start(None, flags)
    assert job.status == 2, job.both
    assert "has checkpoints of a run: go on with it by --resume" in job.err
    assert written == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    job = start(None, [*flags, "--overwrite"])
    assert job.status == 0, job.both
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_the_gradient_is_that_of_the_loss():
    linear = module("linear")
    random = numpy.random.default_rng(0)
    x, weights = random.normal(size=(20, 4)), random.normal(size=(4, 3))
    y = numpy.eye(3)[random.integers(3, size=20)]
    for task in linear.Task:
        gradient, _ = linear.gradient_of(task, weights, x, y)
        for place in numpy.ndindex(weights.shape):
            step = numpy.zeros_like(weights)
            step[place] = 1e-6
            up, down = (linear.gradient_of(task, weights + s, x, y)[1] for s in (step, -step))
            assert (up - down) / 2e-6 == pytest.approx(gradient[place], abs=1e-6)


@pytest.mark.by_day(0)
def test_checkpoints_of_another_shape_are_one_error(start, tmp_path):
    flags = ["--numpy", "--epochs", "1", "--out", tmp_path]
    assert start(None, program("linear", *flags)).status == 0
    job = start(None, program("linear", *flags, "--features", "7", "--resume"))

    assert job.status == 2
    assert job.both.count("does not fit this job: weights of (101, 1), here (8, 1)") == 1, job.both
    assert "Traceback" not in job.both


@pytest.mark.by_day(0)
def test_bad_flags_get_one_clear_message(start):
    job = start(2, program("linear", "--task", "cubic"))

    assert job.status == 2
    assert job.both.count("Usage:") == 1
    assert "'cubic' is not one of" in job.both
