"""A rank's samples one by one, for torch's DataLoader."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import Sampler

from mpiddl.comm.world import World, current_world
from mpiddl.data.shards.kinds import Sharding
from mpiddl.data.shards.kinds import sharding as make_sharding
from mpiddl.data.shards.kinds.base import refuse_other_data
from mpiddl.data.shards.permutation import Permutation
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["EpochSampler", "ShardSampler"]

PIECE = 1 << 16
"""Indices that become Python's numbers at a time."""


class EpochSampler:
    """What the samplers have in common: a sharding, a seed and an epoch, all checked."""

    def __init__(
        self,
        dataset: Sized | int,
        world: World | None,
        shuffle: bool,
        seed: int,
        sharding: str | Sharding,
        options: Mapping[str, Any],
    ) -> None:
        self.dataset = dataset if isinstance(dataset, Sized) else None
        length = len(dataset) if isinstance(dataset, Sized) else operator.index(dataset)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if isinstance(sharding, str):
            sharding = make_sharding(sharding, length, seed=seed, **options)
        elif options:
            raise DataError(f"{', '.join(options)}: give them to the sharding itself")
        refuse_other_data(sharding, length)
        self.sharding = sharding
        self.length = sharding.length
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


class ShardSampler(EpochSampler, Sampler[int]):
    """This rank's samples one by one, for ``DataLoader(sampler=...)``; made for evaluation.

    Every sample goes to exactly one rank, so counts added up over ranks are exact. Ranks may make
    different numbers of batches: do not train with it.

    Args:
        dataset: A data set, or its length.
        world: The ranks; default those of ``mpiddl.init()``.
        shuffle: Another order every epoch (see ``set_epoch``), else the sharding's own.
        seed: Of what is random; the same on every rank.
        sharding: As for ``mpiddl.data.sharding``, or what that made. Default ``random`` with
            ``shuffle``, else ``contiguous``.
        options: What that sharding takes: ``labels``, ``keys``, ``groups``, ``weights``.

    Raises:
        ValueError: The data set is empty, ``seed`` negative, or the sharding does not fit.
    """

    @checks_world
    def __init__(
        self,
        dataset: Sized | int,
        world: World | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        sharding: str | Sharding | None = None,
        **options: Any,
    ) -> None:
        kind = sharding or ("random" if shuffle else "contiguous")
        super().__init__(dataset, world, shuffle and sharding is not None, seed, kind, options)
        self._shard: tuple[int, Any] = -1, None

    def __len__(self) -> int:
        """Samples of this rank."""
        return len(self._samples())

    def __iter__(self) -> Iterator[int]:
        samples = self._samples()
        key = [self.seed, self.epoch, self.rank, self.size]
        order = Permutation(len(samples), key) if self.shuffle else None
        for start in range(0, len(samples), PIECE):
            part = slice(start, start + PIECE)
            if order is not None:
                yield from (int(samples[place]) for place in order[part])
            elif isinstance(samples, range):
                yield from samples[part]
            else:
                yield from samples[part].tolist()

    def _samples(self) -> Any:
        if self._shard[0] != self.epoch:
            self._shard = self.epoch, self.sharding.shard(self.rank, self.size, self.epoch)
        return self._shard[1]
