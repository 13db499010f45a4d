"""A rank's part of every global batch, for torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from numpy.typing import NDArray
from torch.utils.data import Sampler

from mpiddl.api.fail_together import raise_together
from mpiddl.comm.world import World, current_world
from mpiddl.data.agreement import refuse_different, refuse_unlike_samples
from mpiddl.data.loading.collate import collate
from mpiddl.data.shards.epoch_plan import Leg, OrderedWalk, OwnWalk, Place, Walk
from mpiddl.data.shards.kinds import Sharding
from mpiddl.data.shards.kinds.base import Ordered, Owned, facts_of
from mpiddl.data.shards.kinds.random import Random
from mpiddl.data.shards.kinds.weighted import Weighted, shares_of
from mpiddl.data.shards.permutation import Indices
from mpiddl.data.shards.samplers import EpochSampler
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["ShardBatchSampler"]


class ShardBatchSampler(EpochSampler, Sampler[list[int]]):
    """This rank's part of every global batch, for ``DataLoader(batch_sampler=...)``.

    By default all ranks walk through one global order, ``batch_size`` samples at a time, and each
    takes its part of every global batch: the global batch is the same set of samples for every
    world size. Parts differ by at most one sample. The last batch may be smaller, and a rank's
    part of it empty; pass ``collate_fn=sampler.collate`` to the loader where that can happen, and
    weight the gradients with ``model.batch(local=len(x), total=sampler.total)``.

    Collective: ranks compare what they passed.

    Args:
        dataset: A data set, or its length.
        world: The ranks; default those of ``mpiddl.init()``.
        batch_size: Samples per *global* batch, over all ranks.
        shuffle: Another order every epoch (see ``set_epoch``), else the data set's own.
        seed: Of what is random; the same on every rank.
        drop_last: Leave out the last global batch where it is smaller. Shardings whose batches are
            all equally large, within one, leave nothing out (``stratified`` a few samples, to make
            them exactly equal).
        sharding: As for ``mpiddl.data.sharding``, or what that made. ``stratified``, ``weighted``
            and ``balanced`` walk through one global order, as the default does. With
            ``contiguous``, ``strided``, ``hash`` and ``grouped`` each rank keeps to its own
            samples, in another order every epoch, and takes an even part of them in each step.
        check: Compare the ranks' arguments, and of what kind their first samples are.
        options: What the sharding takes: ``labels``, ``keys``, ``groups``, ``weights``.

    Attributes:
        loops: How often batches were begun to be drawn.
        part_lengths: Samples of this rank in each batch that was drawn in this loop.

    Raises:
        ValueError: The data set is empty or has fewer samples than there are ranks, ``batch_size``
            is not positive, ``seed`` negative, or the sharding does not fit; on every rank, if
            ranks do not agree.
    """

    @checks_world
    def __init__(
        self,
        dataset: Sized | int,
        world: World | None = None,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        sharding: str | Sharding | None = None,
        check: bool = True,
        **options: Any,
    ) -> None:
        world = world or current_world()
        checks = check and isinstance(world, World) and world.size > 1
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._past: list[Leg] = []
        self._own: tuple[Indices | range, list[int]] | None = None
        self.loops = 0
        self.part_lengths: list[int] = []
        problem, first = None, 0
        try:
            super().__init__(dataset, world, shuffle, seed, sharding or "random", options)
            self._refuse_useless(batch_size, sharding)
        except (ValueError, TypeError) as error:
            if not checks:
                raise
            problem = str(error)
        if checks:
            raise_together(problem, world)
            weights = {"weights": getattr(self.sharding, "weights", None)}
            refuse_different("ShardBatchSampler", {**self._facts(), **weights}, world)
        try:
            self._begin()
            if isinstance(self._walk, OwnWalk):  # others' samples may not be here
                first = self._walk.first
        except ValueError as error:
            if not checks:
                raise
            problem = str(error)
        if checks:
            refuse_unlike_samples(self.dataset, first, problem, world)

    def _refuse_useless(self, batch_size: int, sharding: str | Sharding | None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if self.length < self.size:
            raise DataError(
                f"{self.length} samples for {self.size} ranks: start fewer ranks, or fix what "
                "loads the data"
            )
        if sharding is None and not self.shuffle:
            self.sharding: Sharding = Random(self.length, self.seed, shuffle=False)
        if not self.shuffle and isinstance(self.sharding, Ordered) and sharding is not None:
            raise DataError("shuffle=False: this sharding makes a random order")
        if isinstance(self.sharding, Weighted):
            shares_of(self.sharding.weights, self.size)

    def _facts(self) -> dict[str, Any]:
        return {
            "the number of samples": self.length,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            **{f"the sharding's {name}": fact for name, fact in facts_of(self.sharding).items()},
        }

    # Batches.

    def _begin(self) -> None:
        """What comes now begins an epoch, or goes on with one."""
        self._walk = self._make_walk()
        self._drawn = -1  # the batch that was drawn last
        self._unread = 0  # batches drawn since ``total`` was read
        self._through = False  # with all batches of the walk
        self._shares: list[tuple[int, NDArray[Any]]] = []  # and the steps from which they count
        if isinstance(self.sharding, Weighted):
            self._shares = [(0, shares_of(self.sharding.weights, self.size))]

    def _make_walk(self) -> Walk:
        place = Place(self.rank, self.size)
        if isinstance(self.sharding, Ordered):
            batches = self.sharding.batches(self.epoch, self.batch_size, self.drop_last)
            return OrderedWalk(batches, place, sum(leg.steps for leg in self._past))
        if not isinstance(self.sharding, Owned):
            raise DataError(f"{type(self.sharding).__name__} has neither batches nor owners")
        legs = self._past
        if not legs or legs[-1].size != self.size:
            legs = [*legs, Leg(self.size, 0)]
        if self._own is None:
            self._own = self.sharding.shard(*place), self.sharding.lengths(self.size)
        key = [self.seed, self.epoch] if self.shuffle else None
        return OwnWalk(self.sharding, self._own, key, self.batch_size, place, legs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming epoch; the same number on every rank.

        Raises:
            ValueError: ``epoch`` is negative.
        """
        goes_on = epoch == self.epoch
        super().set_epoch(epoch)
        if not goes_on:
            self._begin_whole()

    def _begin_whole(self) -> None:
        """A whole epoch, with the shares that came last."""
        self._past = []
        last = [(0, shares) for _, shares in self._shares[-1:]]
        self._begin()
        self._shares = last

    def __len__(self) -> int:
        """Global batches (that are left) of the epoch, the same on every rank."""
        return len(self._walk)

    def __iter__(self) -> Iterator[list[int]]:
        if self._through:  # the epoch once more; what it began with after a stop is over
            self._begin_whole()
        self._drawn, self._unread, self.loops = -1, 0, self.loops + 1
        self.part_lengths = []
        walk = self._walk
        self._through = len(walk) == 0  # it went on at an epoch's very end
        for step in range(len(walk)):
            part = walk.part(step, self._shares_at(step)).tolist()
            self.part_lengths.append(len(part))
            self._drawn = step
            self._unread += 1
            self._through = step == len(walk) - 1
            yield part

    def total_at(self, step: int) -> int:
        """Samples over all ranks in global batch ``step``, counted from where the loop began."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in an epoch of {len(self)} batches")
        return self._walk.total(step)

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
        return collate(samples, self.dataset)

    # Uneven shares.

    @property
    def drawn(self) -> int:
        """Batches that were drawn since the loop began; a loader with workers draws ahead."""
        return self._drawn + 1

    def set_shares(self, weights: Sequence[float], step: int) -> None:
        """From batch ``step`` on each rank gets a part in proportion to its weight.

        Every rank calls it with the same arguments. The next epoch begins with the last ones.

        Args:
            weights: A positive number for each rank.
            step: Counted from where the loop began; not drawn yet on any rank.

        Raises:
            ValueError: That batch was drawn already, weights do not fit, or each rank keeps to its
                own samples.
        """
        if not isinstance(self.sharding, Ordered):
            raise DataError("each rank keeps to its own samples: shares cannot be moved")
        if step < self.drawn:
            raise ValueError(f"batch {step} was drawn already, {self.drawn} is next")
        self._shares = [pair for pair in self._shares if pair[0] < step]
        self._shares.append((step, shares_of(weights, self.size)))

    def _shares_at(self, step: int) -> NDArray[Any] | None:
        counting = [shares for start, shares in self._shares if start <= step]
        return counting[-1] if counting else None

    def shares_at(self, step: int) -> list[float]:
        """Of each rank, in batch ``step`` as things are; they add up to 1."""
        shares = self._shares_at(step)
        return [1 / self.size] * self.size if shares is None else shares.tolist()

    # Going on later.

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """How far the job has come in this epoch: plain JSON, the same on every rank.

        Args:
            step: Batches of this loop that are behind; default all that were drawn, if ``total``
                was read for each.

        Raises:
            RuntimeError: Without ``step``, and batches were drawn ahead.
        """
        if step is None:
            if self._unread > 1:
                raise RuntimeError(
                    "batches were drawn ahead, or in steps that did not read total: pass how many "
                    "your loop is through with, state_dict(step)"
                )
            step = self.drawn
        if not 0 <= step <= len(self):
            raise IndexError(f"step {step} is not in an epoch of {len(self)} batches")
        legs = [*self._past]
        if legs and legs[-1].size == self.size:
            step += legs.pop().steps
        shares = self._shares_at(step)
        return {
            **self._facts(),
            "epoch": self.epoch,
            "past": [list(leg) for leg in [*legs, Leg(self.size, step)]],
            "shares": None if shares is None else shares.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken, on this or another number of ranks.

        The rest of that epoch has exactly the samples that were not visited; steps count from 0
        again. The number of ranks may change as often as one likes.

        Raises:
            ValueError: It is of another data set, or of other arguments.
        """
        for name, value in self._facts().items():
            if name not in state:
                raise DataError(f"this is no state of a ShardBatchSampler: it has no {name!r}")
            if state[name] != value:
                raise DataError(
                    f"the state is of a sampler with another {name}: {state[name]}, here {value}"
                )
        self.epoch = int(state["epoch"])
        self._past = [Leg(int(size), int(steps)) for size, steps in state["past"]]
        self._begin()
        shares = state["shares"]
        if shares is not None and len(shares) == self.size:
            self._shares = [(0, shares_of(shares, self.size))]
