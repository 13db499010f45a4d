"""Matrix factorisation: sparse and dense gradients come to the same."""

from __future__ import annotations

import re

import numpy
import pytest
from training_jobs import forget_all_but_the_first_checkpoint, module, program, rows


def test_sparse_gradients_reach_the_noise_and_go_on_in_mid_epoch(start, tmp_path):
    """27,000 ratings in batches of 256: an epoch has 106 steps."""
    command = program("recommender", "--out", tmp_path, "--checkpoint-every", "150", "--keep", "9")
    job = start(2, command)
    assert job.status == 0, job.both
    assert job.err == ""
    assert 0.5 < rows(tmp_path)[-1]["test_rmse"] < 0.58  # 0.5 is the noise
    whole = (tmp_path / "model.safetensors").read_bytes()

    assert forget_all_but_the_first_checkpoint(tmp_path) == 150
    job = start(2, command, "--resume")

    assert job.status == 0, job.both
    assert "goes on after step 150, in epoch 2" in job.out
    assert (tmp_path / "model.safetensors").read_bytes() == whole


def u_data(path, count):
    """A few ratings in MovieLens' format, of users and items whose numbers have gaps."""
    random = numpy.random.default_rng(0)
    users, items = random.integers(20, size=count), random.integers(15, size=count)
    ratings = numpy.clip(1 + users // 6 + items // 8, 1, 5)
    lines = zip(users * 7 + 1, items * 3 + 100, ratings, strict=True)
    path.write_text(
        "".join(f"{user}\t{item}\t{rating}\t881250949\n" for user, item, rating in lines)
    )
    return path


@pytest.mark.by_day(0)
def test_dense_on_three_ranks_is_as_sparse_on_two(start, tmp_path):
    from safetensors.torch import load_file

    weights = []
    for ranks, kind in ((2, "--sparse"), (3, "--dense")):
        out = tmp_path / kind
        flags = ["--data", u_data(tmp_path / "u.data", 1000), "--batch-size", "70", "--epochs", "6"]
        job = start(ranks, program("recommender", *flags, kind, "--out", out))
        assert job.status == 0, job.both
        assert "20 users, 15 items, 900 ratings to train on" in job.out
        assert rows(out)[-1]["test_rmse"] < 0.5
        weights.append(load_file(out / "model.safetensors"))
    for name, sparse in weights[0].items():
        assert (sparse - weights[1][name]).abs().max() < 1e-3, name


@pytest.mark.by_day(0)
def test_compare_tells_that_sparse_sends_less(start, tmp_path):
    flags = ["--compare", "--steps", "20", "--users", "5000", "--items", "2000", "--dim", "16"]
    job = start(2, program("recommender", *flags, "--out", tmp_path))

    assert job.status == 0, job.both
    found = {
        kind: [float(number) for number in numbers.split()]
        for kind, numbers in re.findall(r"^(sparse|dense) +(.*)$", job.out, re.MULTILINE)
    }
    assert found["dense"][1] == pytest.approx((7000 * 17 + 1) * 4 / 1024, abs=0.05)
    assert found["sparse"][1] < 2 * 128 * (8 + 4 * 17) / 1024 + 0.1
    assert found["sparse"][2] == pytest.approx(found["dense"][2], abs=1e-3)


@pytest.mark.by_day(0)
def test_a_file_that_is_not_there_is_one_error(start, tmp_path):
    job = start(2, program("recommender", "--data", tmp_path / "u.data", "--out", tmp_path / "out"))

    assert job.status == 2
    assert job.both.count("No such file") == 1, job.both
    assert "u.data" in job.both
    assert "Traceback" not in job.both


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 lines"),
        (b"1\t2\t3\t4\n" * 9, "has 9 lines of 4 numbers"),
        (b"1\t2\n" * 20, "has 20 lines of 2 numbers"),
        (b"1\t2\t3\t4\n" * 20 + b"1\t2", "no table of numbers"),
        (b"user\titem\trating\n" + b"1\t2\t3\n" * 20, "no table of numbers"),
        (b"1::2::3::4\n" * 20, "no table of numbers"),
        (b"1\t2\tnan\t4\n" * 20, "ratings finite"),
        (b"1.5\t2\t3\t4\n" * 20, "whole numbers"),
        (b"\x1f\x8b\xff" * 20, "no table of numbers"),
    ],
)
def test_files_that_are_no_ratings(tmp_path, content, words):
    (tmp_path / "u.data").write_bytes(content)
    with pytest.raises(ValueError, match=r".") as caught:
        module("recommender").read_ratings(tmp_path / "u.data")
    assert words in str(caught.value)
