"""What those who look for traps are given, and what they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

__all__ = ["Facts", "Trap", "by_node"]

Facts = Sequence[dict[str, Any]]
"""Of every rank, in rank order."""


class Trap(NamedTuple):
    """``error``: training would break. ``warning``: it would be slow, or may break later."""

    severity: Literal["error", "warning", "note"]
    what: str
    fix: str


def by_node(facts: Facts) -> dict[str, list[dict[str, Any]]]:
    """The ranks of each host, in rank order."""
    nodes: dict[str, list[dict[str, Any]]] = {}
    for rank in facts:
        nodes.setdefault(rank["hostname"], []).append(rank)
    return nodes
