"""Samplers for torch's DataLoader: every sample exactly once per epoch, nothing padded."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler, default_collate

from mpiddl.comm.world import World, current_world
from mpiddl.data.shards import epoch_order, part_of
from mpiddl.segments import split

__all__ = ["ShardBatchSampler", "ShardSampler"]


class _EpochSampler:
    """Length, seed and epoch, checked."""

    def __init__(self, dataset: Sized | int, world: World | None, shuffle: bool, seed: int) -> None:
        self.dataset = dataset if isinstance(dataset, Sized) else None
        self.length = len(dataset) if isinstance(dataset, Sized) else operator.index(dataset)
        if self.length < 1:
            raise ValueError("the data set is empty")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        world = world or current_world()
        self.rank, self.size = world.rank, world.size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming epoch; the same number on every rank.

        Raises:
            ValueError: ``epoch`` is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self.epoch = epoch


class ShardBatchSampler(_EpochSampler, Sampler[list[int]]):
    """This rank's part of every global batch, for ``DataLoader(batch_sampler=...)``.

    All ranks walk through one global order, ``batch_size`` samples at a time, and each takes
    its part of every global batch: the global batch is the same set of samples for every world
    size. Parts differ by at most one sample. The last batch may be smaller, and a rank's part
    of it empty; pass ``collate_fn=sampler.collate`` to the loader where that can happen, and
    weight the gradients with ``model.batch(local=len(x), total=sampler.total)``.

    Args:
        dataset: A data set, or its length.
        world: The ranks; default those of ``mpiddl.init()``.
        batch_size: Samples per *global* batch, over all ranks.
        shuffle: Another order every epoch (see ``set_epoch``), else the data set's own.
        seed: Of the shuffle; the same on every rank.
        drop_last: Leave out the last global batch where it is smaller.

    Raises:
        ValueError: The data set is empty, ``batch_size`` is not positive, or ``seed`` negative.
    """

    def __init__(
        self,
        dataset: Sized | int,
        world: World | None = None,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, world, shuffle, seed)
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._drawn = -1  # the batch that was drawn last
        self._unread = 0  # batches drawn since ``total`` was read

    def __len__(self) -> int:
        """Global batches per epoch, the same on every rank."""
        full, rest = divmod(self.length, self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.length, self.epoch, self.seed, self.shuffle)
        self._unread = 0
        for step in range(len(self)):
            self._drawn = step
            self._unread += 1
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield part_of(whole, self.rank, self.size).tolist()

    def total_at(self, step: int) -> int:
        """Samples over all ranks in global batch ``step`` of an epoch."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in an epoch of {len(self)} batches")
        return min(self.batch_size, self.length - step * self.batch_size)

    @property
    def total(self) -> int:
        """Samples over all ranks in the global batch that was drawn last.

        Raises:
            RuntimeError: Batches were drawn ahead (a loader with workers prefetches), so that
                the one in the loop's hands cannot be told; use ``total_at(step)``.
        """
        if self._unread > 1:
            raise RuntimeError(
                f"{self._unread} batches were drawn since total was last read, by a DataLoader "
                "whose workers prefetch, or in steps that did not read it; use total_at(step), "
                "step counted in your loop from 0"
            )
        if self._drawn < 0:
            raise RuntimeError("no batch was drawn yet")
        self._unread = 0
        return self.total_at(self._drawn)

    def collate(self, samples: list[Any]) -> Any:
        """torch's ``default_collate`` that can make a batch of no samples, too.

        Raises:
            ValueError: No samples, and the sampler was made from a length: what an empty batch
                looks like is learnt from the data set's first sample.
        """
        if samples:
            return default_collate(samples)
        if self.dataset is None:
            raise ValueError("an empty part: make the sampler from the data set, not its length")
        return _emptied(default_collate([self.dataset[0]]))  # type: ignore[index]


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


class ShardSampler(_EpochSampler, Sampler[int]):
    """This rank's samples one by one, for ``DataLoader(sampler=...)``; made for evaluation.

    Every sample goes to exactly one rank, so counts added up over ranks are exact. Shares
    differ by at most one sample, so ranks may make different numbers of batches: do not train
    with it.

    Args:
        dataset: A data set, or its length.
        world: The ranks; default those of ``mpiddl.init()``.
        shuffle: Another order every epoch (see ``set_epoch``), else the data set's own.
        seed: Of the shuffle; the same on every rank.

    Raises:
        ValueError: The data set is empty, or ``seed`` negative.
    """

    def __init__(
        self,
        dataset: Sized | int,
        world: World | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, world, shuffle, seed)

    def __len__(self) -> int:
        """Samples of this rank."""
        part: slice = split(self.length, self.size)[self.rank]
        return len(range(self.length)[part])

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.length, self.epoch, self.seed, self.shuffle)
        yield from part_of(order, self.rank, self.size).tolist()
