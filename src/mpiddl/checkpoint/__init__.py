"""Checkpoints: everything that a job needs to go on, safe against being killed at any moment.

    path = mpiddl.checkpoint.save("runs/a/checkpoints", step, model=model, optimizer=optimizer,
                                  sampler=batches)
    found = mpiddl.checkpoint.load("runs/a/checkpoints", model=model, optimizer=optimizer,
                                   sampler=batches)

Names are loaded when they are first used.
"""

from __future__ import annotations

from mpiddl.base.lazy import lazy_names

_HOMES = {
    "Checkpoint": "mpiddl.checkpoint.loading",
    "latest": "mpiddl.checkpoint.folders",
    "load": "mpiddl.checkpoint.loading",
    "save": "mpiddl.checkpoint.saving",
}

__all__ = sorted(_HOMES)


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
