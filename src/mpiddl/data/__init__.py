"""How samples get to ranks, and how results come back.

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Balancer": "mpiddl.data.balance",
    "everywhere": "mpiddl.data.together",
    "scatter": "mpiddl.data.scattering",
    "shard": "mpiddl.data.shards",
    "sharding": "mpiddl.data.shardings",
    "shuffle": "mpiddl.data.shuffling",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpiddl.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
