"""A language model of characters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from training_jobs import TOP, forget_all_but_the_first_checkpoint, module, program, rows

SMALL = ["--epochs", 1, "--batch-size", 23, "--context", 32, "--d-model", 32, "--sample", 0]


def test_defaults_reach_the_bits(start, tmp_path):
    job = start(2, program("charlm", "--out", tmp_path))

    assert job.status == 0, job.both
    assert job.err == ""
    bits = [row["test_bits"] for row in rows(tmp_path)]
    assert len(bits) == 3
    assert 1 < bits[-1] < 2.4
    alphabet = {chr(code) for code in load_file(tmp_path / "model.safetensors")["alphabet"]}
    written = job.out.split("curves.png\n")[1]
    assert len(written) == 300 + 1
    assert {*written} <= alphabet
    assert written.count(" ") > 20  # it has learnt of words


@pytest.mark.by_day(0)
def test_numbers_of_ranks_and_stops_change_nothing(start, tmp_path):
    """Batches of 23 windows; the last has few, over one rank, over three, and after a stop."""
    text = tmp_path / "text.txt"
    text.write_text((TOP / "CONTRIBUTING.md").read_text() * 4)
    one, three = tmp_path / "one", tmp_path / "three"
    job = start(1, program("charlm", *SMALL, "--data", text, "--out", one))
    assert job.status == 0, job.both
    command = program("charlm", *SMALL, "--data", text, "--out", three, "--checkpoint-every", 5)
    job = start(3, command)
    assert job.status == 0, job.both

    assert rows(one)[0]["test_bits"] == pytest.approx(rows(three)[0]["test_bits"], rel=1e-5)
    parameters = [load_file(out / "model.safetensors") for out in (one, three)]
    for name, values in parameters[0].items():
        torch.testing.assert_close(values, parameters[1][name], atol=1e-4, rtol=1e-4)

    whole = (three / "model.safetensors").read_bytes()
    assert forget_all_but_the_first_checkpoint(three) < rows(three)[0]["step"]
    job = start(3, [*command, "--resume"])
    assert "goes on after step" in job.out, job.both
    assert (three / "model.safetensors").read_bytes() == whole


def test_what_follows_is_not_seen_before():
    charlm = module("charlm")
    torch.manual_seed(0)
    model = charlm.GPT("abcdefgh", charlm.Flags())
    codes = torch.randint(8, (2, 20))
    changed = codes.clone()
    changed[:, 12] = (codes[:, 12] + 1) % 8
    before, after = model(codes), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amin((0, 2)).max() > 1e-3
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_windows_cover_the_text():
    dataset = module("charlm").Windows(torch.arange(31), 10)
    windows = [dataset[number] for number in range(len(dataset))]
    assert len(windows) == 3
    assert torch.cat([codes for codes, _ in windows]).tolist() == list(range(30))
    assert all(torch.equal(codes + 1, following) for codes, following in windows)


@pytest.mark.by_day(0)
def test_a_file_that_is_missing_is_one_error(start, tmp_path):
    job = start(2, program("charlm", "--data", tmp_path / "none.txt", "--out", tmp_path))

    assert job.status == 2
    assert job.both.count(f"error: cannot read {tmp_path}/none.txt: No such file") == 1, job.both
    assert "Traceback" not in job.both


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        (b"fine\ncaf\xe9\n", {}, "line 2: byte 0xe9 is not utf-8 text"),
        (b"", {}, "is empty"),
        (b"x" * 640, {}, "pass a longer text or a smaller --context"),
        (b"x" * 999, {"heads": 5}, "--d-model 64 cannot be shared by --heads 5"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path, text, flags, words):
    charlm = module("charlm")
    (tmp_path / "text").write_bytes(text)
    with pytest.raises(ValueError, match=words):
        charlm.prepare(charlm.Flags(data=tmp_path / "text", **flags))
