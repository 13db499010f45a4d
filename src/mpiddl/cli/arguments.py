"""Checks of options that commands share."""

from __future__ import annotations

import typer

from mpiddl.units import parse_sizes

__all__ = ["check_sizes"]


def check_sizes(text: str) -> str:
    """``text``, if ``parse_sizes`` understands it."""
    try:
        if min(parse_sizes(text)) < 8:
            raise ValueError("sizes must be at least 8B")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text
