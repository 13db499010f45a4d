"""``--config FILE``: flags from a TOML file; what is typed counts more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["take_config"]


def take_config(context: typer.Context, path: Path | None) -> Path | None:
    """The file's values become the defaults of this command.

    Raises:
        typer.BadParameter: It cannot be read, or has keys that are no flags.
    """
    if path is None or context.resilient_parsing:
        return path
    flags = {str(option.name) for option in context.command.params} - {"config", "help"}
    typed = _read(path)
    values = {name.replace("-", "_"): value for name, value in typed.items()}
    if len(values) < len(typed):
        raise typer.BadParameter(f"{path} has a key twice, with - and with _")
    for name, value in values.items():
        if name not in flags:
            known = ", ".join(sorted(flag.replace("_", "-") for flag in flags))
            raise typer.BadParameter(f"{path} has an unknown key {name!r}; valid are {known}")
        if isinstance(value, dict | list):
            raise typer.BadParameter(f"{path}: {name} must be one value, not {value!r}")
    # As text they are checked like what is typed: else 1.5 and true would pass for 1.
    context.default_map = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
    }
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # no TOML, or no text
        raise typer.BadParameter(f"{path} is no TOML file: {error}") from None
    return values
