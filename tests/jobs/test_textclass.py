"""A classifier of texts."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file
from training_jobs import forget_all_but_the_first_checkpoint, module, program, rows

QUICK = ["--model", "transformer", "--epochs", 4, "--batch-size", 23, "--words", 16, "--width", 32]


@pytest.fixture
def folder(tmp_path):
    """Texts of three classes, which differ in a word or two."""
    chance = random.Random(0)
    for name, own in [("dogs", "bark"), ("cats", "purr"), ("fish", "ÖL")]:
        path = tmp_path / "texts" / name
        path.mkdir(parents=True)
        for number in range(40):
            words = chance.choices(["they", "often", "eat", "and", "sleep", "or", "play"], k=8)
            words.insert(chance.randrange(8), own)
            (path / f"{number}.txt").write_text(" ".join(words) + "\n")
    return tmp_path / "texts"


@pytest.mark.by_day(1)
@pytest.mark.parametrize(("model", "accuracy"), [("bag", 0.75), ("transformer", 0.65)])
def test_defaults_reach_the_accuracy(start, tmp_path, model, accuracy):
    """The largest class has 18% of the texts."""
    job = start(2, program("textclass", "--model", model, "--out", tmp_path))

    assert job.status == 0, job.both
    assert job.err == ""
    assert "asyncio, email, http" in job.out
    assert accuracy <= rows(tmp_path)[-1]["test_accuracy"] < 0.99


@pytest.mark.by_day(0)
def test_numbers_of_ranks_and_stops_change_nothing(start, tmp_path, folder):
    """96 texts in batches of 23: the last has four, over one rank, over three, and after a stop."""
    one, three = tmp_path / "one", tmp_path / "three"
    job = start(1, program("textclass", *QUICK, "--data", folder, "--out", one))
    assert job.status == 0, job.both
    command = program("textclass", *QUICK, "--data", folder, "--out", three)
    job = start(3, [*command, "--checkpoint-every", "3", "--keep", "9"])
    assert job.status == 0, job.both
    assert "96 texts to train, 24 to test" in job.out
    assert "cats, dogs, fish" in job.out

    assert rows(three)[-1]["test_accuracy"] == rows(one)[-1]["test_accuracy"] > 0.9
    parameters = [load_file(out / "model.safetensors") for out in (one, three)]
    for name, values in parameters[0].items():
        # The keys' bias has no gradient but rounding, which Adam scales up.
        atol = 1e-2 if name.endswith("in_proj_bias") else 1e-4
        torch.testing.assert_close(values, parameters[1][name], atol=atol, rtol=1e-4)

    whole = (three / "model.safetensors").read_bytes()
    assert forget_all_but_the_first_checkpoint(three) == 3
    job = start(3, [*command, "--resume"])
    assert "goes on after step 3, in epoch 1" in job.out, job.both
    assert (three / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("kind", ["Bag", "Transformer"])
def test_padding_does_not_count(kind):
    textclass = module("textclass")
    flags = textclass.Flags(words=12)
    torch.manual_seed(0)
    model = getattr(textclass, kind)(3, flags).eval()
    words = torch.tensor([textclass.numbers_of(text, flags) for text in ("", "a b", "a b c d e")])
    assert (words == textclass.PADDING).sum(1).tolist() == [11, 9, 6]
    before = model(words)
    vectors = getattr(model, "vectors", None) or model.mean
    with torch.no_grad():
        vectors.weight[textclass.PADDING] = torch.linspace(-3, 3, flags.width)
        vectors.weight[textclass.BEGIN] += 0.1
    after = model(words)
    with torch.no_grad():
        vectors.weight[textclass.BEGIN] -= 0.1
    torch.testing.assert_close(model(words), before)
    assert not torch.allclose(after, before)
    assert len(before.unique(dim=0)) == 3


def test_docstrings_are_read_from_source(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "cases.py").write_text('"""Not this."""')
    (tmp_path / "all.py").write_text(
        '"""Module."""\nraise SystemExit("not to be imported")\n'
        'class A:\n    """Class."""\n    async def f(self):\n        """Of class."""\n'
        'def g():\n    "Function."\ndef h(): pass\n'
    )
    found = [*module("textclass").docstrings(tmp_path)]
    assert sorted(found) == ["Class.", "Function.", "Module.", "Of class."]


def test_a_text_that_comes_twice_counts_once(tmp_path):
    textclass = module("textclass")
    for name, texts in [("a", "same 1 2 3 4"), ("b", "same 5 6 7 8 9")]:
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts.split()):
            (tmp_path / name / f"{number}.txt").write_text(text)
    classes, train, test = textclass.prepare(textclass.Flags(data=tmp_path))
    assert classes == ("a", "b")
    assert len(train) + len(test) == 10


@pytest.mark.by_day(0)
def test_a_broken_text_is_one_error(start, tmp_path, folder):
    (folder / "cats" / "7.txt").write_bytes(b"caf\xe9")
    job = start(2, program("textclass", "--data", folder, "--out", tmp_path))

    assert job.status == 2
    assert job.both.count("error: ") == 1, job.both
    assert "cats/7.txt, line 1: byte 0xe9 is not utf-8 text" in job.both
    assert "Traceback" not in job.both


@pytest.mark.parametrize(
    ("folders", "flags", "words"),
    [
        ([], {}, "must have a folder with .txt files for each class"),
        (["a"], {}, "must have a folder with .txt files for each class"),
        (["a", "b"], {}, "there is no text of class a"),
        (["a", "b"], {"heads": 5}, "--width 64 cannot be shared by --heads 5"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path, folders, flags, words):
    textclass = module("textclass")
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=words):
        textclass.prepare(textclass.Flags(data=tmp_path, **flags))
