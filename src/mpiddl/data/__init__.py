"""How samples get to ranks, and how results come back.

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AUC": "mpiddl.data.metrics",
    "Accuracy": "mpiddl.data.metrics",
    "Balancer": "mpiddl.data.balance",
    "ConfusionMatrix": "mpiddl.data.metrics",
    "ImageFolder": "mpiddl.data.readers.images",
    "Mean": "mpiddl.data.metrics",
    "NodeSharedDataset": "mpiddl.data.node_shared",
    "ShardedStream": "mpiddl.data.streams",
    "Shuffler": "mpiddl.data.shuffler",
    "Skew": "mpiddl.data.skewness",
    "Table": "mpiddl.data.readers.table",
    "TextLines": "mpiddl.data.readers.text",
    "broadcast_file": "mpiddl.data.file_broadcast",
    "ensemble": "mpiddl.data.ensembling",
    "everywhere": "mpiddl.overlap.together",
    "gather_predictions": "mpiddl.data.predictions",
    "gather_tensors": "mpiddl.data.predictions",
    "loader": "mpiddl.data.loaders",
    "read_csv": "mpiddl.data.readers.table",
    "read_idx": "mpiddl.data.readers.idx",
    "read_npy": "mpiddl.data.readers.npy",
    "read_npz": "mpiddl.data.readers.npy",
    "scatter": "mpiddl.data.scattering",
    "shard": "mpiddl.data.shards",
    "sharding": "mpiddl.data.shardings",
    "shuffle": "mpiddl.data.shuffling",
    "skew": "mpiddl.data.skewness",
    "skew_of": "mpiddl.data.skewness",
    "split": "mpiddl.data.splits",
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
