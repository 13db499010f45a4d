"""Flags of training programs, typed and from a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from mpiddl import job
from mpiddl.job.flags import command_of


@dataclass
class Flags(job.Flags):
    out: Path = Path("runs/none")
    lr: float = 0.25
    hidden: Annotated[int, typer.Option(min=2, help="Units.")] = 8
    deep: Annotated[bool, typer.Option(help="More layers.")] = False


@pytest.fixture
def call(tmp_path, monkeypatch):
    """``call("--epochs", "3")``: the flags, or what was said and the status."""
    monkeypatch.chdir(tmp_path)
    found = []

    def main(flags: Flags) -> None:
        """Train something."""
        found.append(flags)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command_of(main, Flags))

    def run(*arguments):
        found.clear()
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
        if found:
            return found[0]
        return result.exit_code, re.sub(r"[^\S ]|[│╭╮╰╯─]| +", " ", result.output)

    return run


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return "--config", str(path)

    return write


def test_defaults_are_the_programs_own(call):
    flags = call()
    assert (flags.lr, flags.hidden, flags.epochs, flags.out) == (0.25, 8, 20, Path("runs/none"))


def test_help_has_defaults_and_what_the_program_does(call):
    status, text = call("--help")
    assert status == 0
    assert "Train something." in text
    for words in ("--hidden", "[default: 8]", "--lr", "[default: 0.25]", "--config", "--resume"):
        assert words in text


def test_an_option_keeps_its_checks_when_its_default_changes(call):
    status, text = call("--lr", "-1")
    assert status == 2
    assert "not a positive number" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "many"], "--epochs"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--lr", "0"], "not a positive number"),
        (["--lr", "nan"], "not a positive number"),
        (["--lr", "inf"], "not a positive number"),
        (["--seed", "99999999999999999999999"], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--algorithm", "tree"], "is none of auto, shared"),
        (["--bucket-size", "big"], "not a size"),
        (["--bucket-size", "0"], "must be positive"),
        (["--out", "/proc/none"], "cannot write"),
        (["--keep", "0"], "--keep"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_told(call, flags, words):
    status, said = call(*flags)
    assert status == 2
    assert words in said


def test_a_file_gives_values_and_what_is_typed_counts_more(call, config):
    flags = call(
        *config('epochs = 3\nbatch-size = 10\nlr = 0.5\ndeep = true\nout = "here"'), "--lr", "0.125"
    )
    assert (flags.epochs, flags.batch_size, flags.lr, flags.deep) == (3, 10, 0.125, True)
    assert flags.out == Path("here")
    assert call(*config("resume = true")).resume


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown key 'epoch'; valid are algorithm, batch-size,"),
        ("config = 'other.toml'", "unknown key 'config'"),
        ("epochs = 1.5", "Invalid value for '--epochs'"),
        ("epochs = 0", "Invalid value for '--epochs'"),
        ("hidden = 'many'", "Invalid value for '--hidden'"),
        ("lr = -1.0", "not a positive number"),
        ("lr = nan", "not a positive number"),
        ("epochs = true", "Invalid value for '--epochs'"),
        ("epochs = [1, 2]", "epochs must be one value"),
        ("[training]\nepochs = 1", "unknown key 'training'"),
        ("epochs 3", "is no TOML file"),
        ("epochs = 3\nepochs = 4", "is no TOML file"),
    ],
)
def test_a_bad_file_is_told(call, config, text, words):
    status, said = call(*config(text))
    assert status == 2
    assert words in said


def test_a_file_that_is_missing_or_no_text_is_told(call, tmp_path):
    assert "cannot be read: No such file or directory" in call("--config", "none.toml")[1]
    assert "cannot be read: Is a directory" in call("--config", str(tmp_path))[1]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "is no TOML file" in call("--config", str(tmp_path / "binary"))[1]


@pytest.mark.parametrize("arguments", [("--resume", "--overwrite"), ("--overwrite", "--resume")])
def test_what_goes_on_cannot_begin_anew(call, arguments):
    status, said = call(*arguments)
    assert status == 2
    assert "choose one" in said
    for name in arguments:
        assert getattr(call(name), name.removeprefix("--")) is True
