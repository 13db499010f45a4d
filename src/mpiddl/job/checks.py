"""Whether what a user typed can be used; typer prints the answer."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import typer

from mpiddl.base.settings import ALGORITHM_NAMES
from mpiddl.base.units import parse_bytes
from mpiddl.launch.launchers import read_launch

__all__ = ["known_algorithm", "not_both", "positive", "size", "writable"]


def known_algorithm(name: str | None) -> str | None:
    if name is not None and name not in ALGORITHM_NAMES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(ALGORITHM_NAMES)}")
    return name


def not_both(context: typer.Context, value: bool) -> bool:
    """Of --resume and --overwrite; which one is seen first depends on what was typed first."""
    if value and (context.params.get("resume") or context.params.get("overwrite")):
        raise typer.BadParameter("--resume goes on with what --overwrite removes: choose one")
    return value


def positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


def size(text: str | None) -> str | None:
    try:
        if text is not None and text != "auto" and parse_bytes(text) < 1:
            raise ValueError("must be positive")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def writable(folder: Path) -> Path:
    if not read_launch().is_first:
        return folder  # rank 0 alone writes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror}") from None
    return folder
