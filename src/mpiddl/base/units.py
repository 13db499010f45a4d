"""Numbers, sizes and times as people write them."""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import Any

__all__ = [
    "format_bytes",
    "format_seconds",
    "integer",
    "parse_bytes",
    "parse_seconds",
    "parse_sizes",
]

_BINARY = {"": 1, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_MOST_BYTES = 2**63 - 1
_MOST_SECONDS = 1e9
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|)\s*", re.IGNORECASE)


def integer(value: Any, name: str) -> int:
    """``value``, if it is one of Python's or numpy's integers: a 1.5 would be cut off later.

    Raises:
        TypeError: It is something else.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def parse_bytes(text: str) -> int:
    """``"25MiB"`` -> 26214400. ``KiB MiB GiB TiB`` are binary, ``KB MB GB TB`` decimal.

    Raises:
        ValueError: ``text`` is not a size, not a whole number of bytes, or 2^63 of them or more.
    """
    match = _PATTERN.fullmatch(text)
    factor = (_BINARY | _DECIMAL).get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write for example 512KiB, 25MiB or 1048576")
    nbytes = Fraction(match.group(1)) * factor
    if nbytes.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    if nbytes > _MOST_BYTES:
        raise ValueError(f"{text!r} is more than any machine has")
    return int(nbytes)


def format_bytes(nbytes: int) -> str:
    """26214400 -> ``"25MiB"``; the largest binary unit that keeps at most one decimal."""
    for unit in ("TI", "GI", "MI", "KI"):
        if nbytes >= _BINARY[unit]:
            return f"{nbytes / _BINARY[unit]:.1f}".removesuffix(".0") + f"{unit[0]}iB"
    return f"{nbytes}B"


def parse_sizes(text: str, factor: int = 4) -> list[int]:
    """``"1KiB:1MiB"`` -> 1 KiB, 4 KiB, ... up to 1 MiB; ``"1KiB,3MiB"`` -> those two.

    Raises:
        ValueError: Not sizes, none of them, or from large to small.
    """
    if ":" not in text:
        return [parse_bytes(part) for part in text.split(",")]
    first, last = (parse_bytes(part) for part in text.split(":", 1))
    if not 0 < first <= last:
        raise ValueError(f"{text!r} goes from large to small; write for example 1KiB:256MiB")
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return sizes if sizes[-1] == last else [*sizes, last]


def parse_seconds(text: str) -> float:
    """``"10m"`` -> 600.0. Units are ms, s, m (or min) and h; without one it is seconds.

    Raises:
        ValueError: ``text`` is not a time, or is longer than 30 years.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time; write for example 90s, 10m, 1.5h or 600")
    seconds = float(match.group(1)) * _SECONDS[match.group(2).lower()]
    if seconds > _MOST_SECONDS:
        raise ValueError(f"{text!r} is longer than 30 years; 0 means without a limit")
    return seconds


def format_seconds(seconds: float) -> str:
    """0.0123 -> ``"12.3 ms"``; three digits at most, or minutes and hours."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
