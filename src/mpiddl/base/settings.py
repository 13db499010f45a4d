"""The only reader of ``MPIDDL_*`` environment variables.

Rank 0's settings count for every rank of a job (``World`` broadcasts them), because ranks
that chose different algorithms would wait for each other for ever.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from mpiddl.base.units import format_bytes, parse_bytes, parse_seconds
from mpiddl.errors import SettingsError

__all__ = ["ALGORITHM_NAMES", "ENGINES", "Settings", "read"]

PREFIX = "MPIDDL_"
ALGORITHM_NAMES = (
    "auto",
    "shared",
    "hierarchical",
    "ring",
    "direct",
    "doubling",
    "library",
    "nccl",
    "reference",
)

MOST_THREADS = 1024
ENGINES = ("auto", "inline", "after", "thread")


def _parse_flag(text: str) -> bool:
    values = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.lower() not in values:
        raise ValueError(f"{text!r} is not a switch; write 1 or 0")
    return values[text.lower()]


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        nbytes = parse_bytes(text)
        if nbytes < least:
            raise ValueError(f"must be at least {format_bytes(least)}")
        return nbytes

    return parse


def _bucket_size(text: str) -> int | str:
    return text if text == "auto" else _at_least(1)(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise ValueError(f"{text!r} is not a number from 1 to {MOST_THREADS}")
    return int(text)


def _one_of(*valid: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in valid:
            raise ValueError(f"{text!r} is none of {', '.join(valid)}")
        return text

    return parse


def _setting(default: Any, parse: Callable[[str], Any], help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help_text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What MPIDDL_ALGORITHM, MPIDDL_CHECK, ... say; the fields are the lower-case names.

    None: not set, and the default depends on the device.
    """

    algorithm: str = _setting(
        "auto", _one_of(*ALGORITHM_NAMES), "all-reduce algorithm where a call names none"
    )
    check: bool = _setting(False, _parse_flag, "compare shape, dtype and op of every call")
    bucket_size: int | str | None = _setting(None, _bucket_size, "largest gradient bucket, or auto")
    chunk_size: int | None = _setting(None, _at_least(4096), "unit of pipelining in the ring")
    single_copy: bool = _setting(
        True, _parse_flag, "let the ranks of a node read and write each other's memory"
    )
    tune: str = _setting("", str, "file of what `mpiddl tune` measured")
    engine: str = _setting("auto", _one_of(*ENGINES), "who drives collectives")
    engine_threads: int = _setting(1, _count, "torch threads of the engine's own thread")
    timeout: float = _setting(
        600.0, parse_seconds, "a wait in which nothing moves for longer ends the job; 0 never does"
    )
    staging: str = _setting(
        "auto", _one_of("auto", "device", "host"), "how GPU memory gets to MPI; auto finds out"
    )
    trace: str = _setting("", str, "folder for a trace of every rank")
    offer_rank: bool = _setting(
        True, _parse_flag, "set RANK, WORLD_SIZE and LOCAL_RANK for other libraries"
    )


def read(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment.

    Raises:
        SettingsError: An unknown ``MPIDDL_*`` variable (a typing error would otherwise pass
            in silence), or a value that cannot be used.
    """
    fields = {PREFIX + field.name.upper(): field for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = {}
    for name in sorted(name for name in environ if name.startswith(PREFIX)):
        if name not in fields:
            known = sorted(field.removeprefix(PREFIX) for field in fields)
            near = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known are {', '.join(fields)}"
            raise SettingsError(f"unknown setting {name}={environ[name]}; {hint}")
        field = fields[name]
        try:
            values[field.name] = field.metadata["parse"](environ[name])
        except ValueError as error:
            what = field.metadata["help"]
            raise SettingsError(f"{name}={environ[name]} ({what}): {error}") from None
    return Settings(**values)
