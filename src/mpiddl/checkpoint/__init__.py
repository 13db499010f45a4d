"""Checkpoints: everything that a job needs to go on, safe against being killed at any moment.

    path = mpiddl.checkpoint.save("runs/a/checkpoints", step, model=model, optimizer=optimizer,
                                  sampler=batches)
    found = mpiddl.checkpoint.load("runs/a/checkpoints", model=model, optimizer=optimizer,
                                   sampler=batches)

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Checkpoint": "mpiddl.checkpoint.loading",
    "latest": "mpiddl.checkpoint.folders",
    "load": "mpiddl.checkpoint.loading",
    "save": "mpiddl.checkpoint.saving",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpiddl.checkpoint' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
