"""Every number that a command takes: none that is infinite, negative or too large gets past it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from mpiddl import job
from mpiddl.base.settings import read
from mpiddl.cli.main import app
from mpiddl.job.flags import command_of

HUGE = "9" * 400
TEXTS = {
    "sizes": ("1e400", HUGE, "-1", "nan", "1KiB:inf"),
    "weights": ("nan", "1,inf", "-1,1", "", "1,,1"),
    "step": ("nan", "-1", "2:inf"),
    "bucket_size": (HUGE, "-1", "nan", "inf"),
    "ddp_bucket_size": (HUGE, "-1", "nan", "inf"),
    "time": ("nan", "inf", "-1", HUGE),
}
"""Numbers that come as text, by the names of their flags."""
NO_NUMBERS = {
    *("account", "algorithm", "algorithms", "candidates", "device", "dtype", "engine", "folder"),
    *("model", "mpi", "name", "op", "partition", "program", "sharding", "staging"),
}


@dataclass
class Flags(job.Flags):
    out: Path = Path("runs/none")
    plain: float = 0.5
    count: int = 3
    perhaps: float | None = None
    share: Annotated[float, typer.Option(min=0, max=1)] = 0.5


def program():
    one = typer.Typer()
    one.command()(command_of(lambda flags: None, Flags))
    return one


def commands(one, path=()):
    """Every command of an app: how it is called, and the function."""
    for info in one.registered_commands:
        yield [*path, info.name], info.callback
    for group in one.registered_groups:
        yield from commands(group.typer_instance, (*path, group.name))


def numbers_of(function):
    """Its flags that take numbers: the flag, its name, and ``int``, ``float`` or ``str``."""
    for name, hint in get_type_hints(function, include_extras=True).items():
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        option = next((note for note in notes if isinstance(note, OptionInfo)), None)
        found = ({kind} | set(get_args(kind))) & {int, float, str}
        if option and found and name not in NO_NUMBERS:
            declared = [each for each in option.param_decls or () if each.startswith("--")]
            yield (declared or [f"--{name.replace('_', '-')}"])[0], name, found.pop(), option


EVERY = [
    pytest.param(one, words, *number, id=f"{words[-1]} {number[0]}")
    for one in (app, program())
    for words, function in commands(one)
    for number in numbers_of(function)
]


@pytest.mark.parametrize(("one", "words", "flag", "name", "kind", "option"), EVERY)
def test_odd_numbers_are_usage_errors(one, words, flag, name, kind, option):
    odd = {float: ("nan", "inf", "-inf", "1e999"), int: (HUGE, "nan", "1.5")}.get(kind)
    odd = odd or TEXTS[name]
    if option.min is not None:
        odd = (*odd, "-1")
    words = words if one is app else []
    for value in odd:
        done = CliRunner().invoke(one, [*words, f"{flag}={value}"], env={"COLUMNS": "2000"})
        assert done.exit_code == 2, (value, done.output)
        assert f"Invalid value for '{flag}" in done.output, (value, done.output)


def test_the_walk_finds_flags():
    flags = {parameter.values[2] for parameter in EVERY}
    assert {"--min-busbw", "--sizes", "--repeats", "--lr", "--plain", "--ranks"} <= flags
    assert len(EVERY) > 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHUNK_SIZE", HUGE),
        ("BUCKET_SIZE", "8388608TiB"),
        ("TIMEOUT", HUGE),
        ("TIMEOUT", "nan"),
        ("ENGINE_THREADS", HUGE[:30]),
    ],
)
def test_settings_too(name, value):
    with pytest.raises(ValueError, match=name):
        read({f"MPIDDL_{name}": value})
