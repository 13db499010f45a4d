"""When and how the replicas of a model are made equal: one file a strategy.

    model = mpiddl.DataParallel(model, strategy=mpiddl.strategies.Naive())

A new strategy is a file here, which derives from ``Strategy``, a line below, and a test parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpiddl.base.lazy import lazy_names

if TYPE_CHECKING:
    from mpiddl.strategies.base import Strategy as Strategy
    from mpiddl.strategies.naive import Naive as Naive
    from mpiddl.strategies.synchronous import Synchronous as Synchronous

_HOMES = {
    "Naive": "mpiddl.strategies.naive",
    "Strategy": "mpiddl.strategies.base",
    "Synchronous": "mpiddl.strategies.synchronous",
}

__all__ = ["Naive", "Strategy", "Synchronous"]


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
