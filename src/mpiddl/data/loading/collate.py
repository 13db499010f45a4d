"""Batches of no samples."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import default_collate

__all__ = ["collate"]


def collate(samples: list[Any], dataset: Sized | None) -> Any:
    """torch's ``default_collate`` that can make a batch of no samples, too.

    Raises:
        ValueError: No samples, and no data set: what an empty batch looks like is learnt from its
            first sample.
    """
    if samples:
        return default_collate(samples)
    if dataset is None:
        raise ValueError("an empty part: make the sampler from the data set, not its length")
    return _emptied(default_collate([dataset[0]]))  # type: ignore[index]


def _emptied(batch: Any) -> Any:
    """A batch with its samples taken out."""
    if isinstance(batch, torch.Tensor):
        return batch[:0]
    if isinstance(batch, dict):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_emptied(value) for value in batch))
    if isinstance(batch, list | tuple):
        if all(isinstance(value, str | bytes) for value in batch):
            return []
        return [_emptied(value) for value in batch]
    return batch
