"""How samples get to ranks, and how results come back.

Names are loaded when they are first used.
"""

from __future__ import annotations

from mpiddl.base.lazy import lazy_names

_HOMES = {
    "AUC": "mpiddl.data.evaluating.metrics",
    "Accuracy": "mpiddl.data.evaluating.metrics",
    "Balancer": "mpiddl.data.shards.balance",
    "ConfusionMatrix": "mpiddl.data.evaluating.metrics",
    "ImageFolder": "mpiddl.data.reading.images",
    "Mean": "mpiddl.data.evaluating.metrics",
    "NodeSharedDataset": "mpiddl.data.moving.node_shared",
    "ShardedStream": "mpiddl.data.loading.streams",
    "Shuffler": "mpiddl.data.moving.shuffler",
    "Skew": "mpiddl.data.shards.skewness",
    "Table": "mpiddl.data.reading.table",
    "TextLines": "mpiddl.data.reading.text",
    "broadcast_file": "mpiddl.data.moving.file_broadcast",
    "ensemble": "mpiddl.data.evaluating.ensembling",
    "everywhere": "mpiddl.api.fail_together",
    "gather_predictions": "mpiddl.data.evaluating.predictions",
    "gather_tensors": "mpiddl.data.evaluating.predictions",
    "loader": "mpiddl.data.loading.loaders",
    "read_csv": "mpiddl.data.reading.table",
    "read_idx": "mpiddl.data.reading.idx",
    "read_npy": "mpiddl.data.reading.npy",
    "read_npz": "mpiddl.data.reading.npy",
    "scatter": "mpiddl.data.moving.scattering",
    "shard": "mpiddl.data.shards.shard",
    "sharding": "mpiddl.data.shards.kinds",
    "shuffle": "mpiddl.data.moving.shuffling",
    "skew": "mpiddl.data.shards.skewness",
    "skew_of": "mpiddl.data.shards.skewness",
    "split": "mpiddl.data.shards.splits",
}

__all__ = sorted(_HOMES)


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
