"""Names of tensors, with torch.compile and without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["in_names_of", "plain_name"]

COMPILED = "_orig_mod"
"""What torch.compile puts into the names of a module that it wraps."""


def plain_name(name: str) -> str:
    """Without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def in_names_of(here: Iterable[str], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored state under this model's names, where torch.compile alone makes a difference."""
    names = list(here)
    by_plain = {plain_name(name): name for name in names}
    if len(by_plain) < len(names):  # both of them are in this model: no guesses
        return dict(stored)
    found = {by_plain.get(plain_name(name), name): value for name, value in stored.items()}
    return found if len(found) == len(stored) else dict(stored)
