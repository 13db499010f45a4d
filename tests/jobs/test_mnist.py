"""MNIST, from IDX files and from what is embedded."""

from __future__ import annotations

import gzip
import struct

import pytest
from matrix import times
from training_jobs import forget_all_but_the_first_checkpoint, module, program, rows

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
FILES += [name.replace("train", "t10k") for name in FILES]


def idx(array):
    """The bytes of an IDX file of unsigned bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype("u1").tobytes()


@pytest.fixture(scope="session")
def digits():
    """Contents of the four files: every pixel of the small digits is 3 x 3, with a margin of 2."""
    import numpy
    from sklearn.datasets import load_digits

    raw = load_digits()
    large = numpy.kron(raw.images * (255 / 16), numpy.ones((3, 3)))
    images = numpy.pad(large, ((0, 0), (2, 2), (2, 2)))
    arrays = [images[:1500], raw.target[:1500], images[1500:], raw.target[1500:]]
    return {name: idx(array) for name, array in zip(FILES, arrays, strict=True)}


def write(folder, files, packed=()):
    for name, content in files.items():
        path = folder / (f"{name}.gz" if name in packed else name)
        path.write_bytes(gzip.compress(content) if name in packed else content)
    return folder


def test_the_perceptron_on_two_and_three_ranks(start, tmp_path):
    """The same run, whatever the number of ranks: it has no dropout."""
    counts, found = (2, 3)[: times(2)], {}
    for ranks in counts:
        job = start(ranks, program("mnist", "--out", tmp_path / str(ranks)))
        assert job.status == 0, job.both
        assert job.err == ""
        found[ranks] = rows(tmp_path / str(ranks))
    assert found[2][-1]["test_accuracy"] >= 0.95
    for two, three in zip(found[2], found[counts[-1]], strict=True):
        assert two["loss"] == pytest.approx(three["loss"], rel=1e-3)
        assert two["test_accuracy"] == pytest.approx(three["test_accuracy"], abs=0.01)


@pytest.mark.by_day(0)
def test_the_cnn_goes_on_in_mid_epoch_to_the_same_bits(start, tmp_path):
    """With dropout, whose random numbers go on too. An epoch has 23 steps."""
    flags = ["--model", "cnn", "--epochs", "4", "--checkpoint-every", "30", "--keep", "9"]
    command = program("mnist", *flags, "--out", tmp_path)
    job = start(2, command)
    assert job.status == 0, job.both
    assert rows(tmp_path)[-1]["test_accuracy"] >= 0.9
    whole = (tmp_path / "model.safetensors").read_bytes()

    assert forget_all_but_the_first_checkpoint(tmp_path) == 30
    job = start(2, command, "--resume")

    assert job.status == 0, job.both
    assert "goes on after step 30, in epoch 2" in job.out
    assert (tmp_path / "model.safetensors").read_bytes() == whole


@pytest.mark.by_day(0)
def test_files_that_a_user_has(start, tmp_path, digits):
    write(tmp_path, digits, packed=FILES[1:3])
    flags = ["--data", tmp_path, "--epochs", "3", "--batch-size", "100"]
    job = start(2, program("mnist", *flags, "--out", tmp_path / "out"))

    assert job.status == 0, job.both
    assert "1500 training images, 297 test images" in job.out
    assert rows(tmp_path / "out")[-1]["test_accuracy"] >= 0.8


def test_missing_files_are_named_once_with_the_alternative(start, tmp_path, digits):
    write(tmp_path, {FILES[0]: digits[FILES[0]]})
    job = start(2, program("mnist", "--data", tmp_path, "--out", tmp_path / "out"))

    assert job.status == 2
    assert job.both.count(f"{tmp_path} lacks {', '.join(FILES[1:])}.") == 1, job.both
    assert "--data digits" in job.both
    assert "Traceback" not in job.both


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (FILES[0], lambda content: content[:-1], "is cut off"),
        (FILES[1], lambda content: content + b"\0", "is too long"),
        (FILES[1], lambda content: content[:8] + b"\x0a" + content[9:], "labels must be 0 to 9"),
        (FILES[2], lambda content: content[:8] + content[12:16] * 2, "cut off"),
        (FILES[3], lambda content: b"PK" + content[2:], "is not an IDX file"),
        (FILES[3], lambda content: content[:4] + bytes(4), "with labels in shape (0,)"),
    ],
)
def test_files_that_are_not_mnist(tmp_path, digits, name, change, words):
    write(tmp_path, {**digits, name: change(digits[name])})
    with pytest.raises(ValueError, match=r".") as caught:
        module("mnist").load_idx(tmp_path)
    assert words in str(caught.value)


def test_images_of_another_size(tmp_path, digits):
    header, pixels = digits[FILES[0]][:16], digits[FILES[0]][16:]
    other = header[:8] + struct.pack(">II", 14, 56) + pixels
    write(tmp_path, {**digits, FILES[0]: other})
    with pytest.raises(ValueError, match=r"in shape \(1500, 14, 56\)"):
        module("mnist").load_idx(tmp_path)
