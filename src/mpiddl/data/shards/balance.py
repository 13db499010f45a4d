"""Moves share of every global batch from slow ranks to fast ones, as they are measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy

from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World, current_world
from mpiddl.data.shards.batches import ShardBatchSampler
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["Balancer"]

FORMAT = "mpiddl-balance-1"
SMALLEST = 0.05
"""Of an even share: a rank that had nothing to do would never be measured again."""


class _Trains(Protocol):
    def stats(self) -> Any: ...


class Balancer:
    """Measures how long each rank computes, and gives shares in proportion to speed.

    Call ``step()`` once a step, on every rank. Gradients stay the mean over the global batch as
    long as they are weighted by true counts: ``model.batch(local=len(x), total=...)``.

        balancer = mpiddl.data.Balancer(batches, model, every=20)
        for x, y in loader:
            with model.batch(local=len(x), total=batches.total):
                loss_of(model(x), y).backward()
            optimizer.step()
            balancer.step()

    Args:
        batches: What deals samples out: with one global order.
        model: The ``DataParallel`` that is trained; what it waited for others is not counted. With
            None, ``step`` is told how long this rank computed.
        world: The ranks; default those of ``mpiddl.init()``.
        every: Steps between two looks; collective. 0: only when ``rebalance()`` is called, between
            epochs, say.
        smoothing: Of the measured speed this part counts, of the present shares the rest; 1 trusts
            the last look alone.
        tolerance: Shares stay while no rank computes longer than the mean by more than this.
        clock: In seconds.

    Attributes:
        rounds: What every look found: ``step`` (counted from the first), ``shares`` and
            ``seconds`` a step of each rank. The same on every rank.

    Raises:
        ValueError: ``every`` or ``smoothing`` is out of range.
    """

    @checks_world
    def __init__(
        self,
        batches: ShardBatchSampler,
        model: _Trains | None,
        world: World | None = None,
        *,
        every: int = 0,
        smoothing: float = 0.7,
        tolerance: float = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every < 0 or not 0 < smoothing <= 1:
            raise DataError(f"every={every} must not be negative, 0 < smoothing={smoothing} <= 1")
        self._batches = batches
        self._model = model
        self._every = every
        self._smoothing = smoothing
        self._tolerance = tolerance
        self._clock = clock
        self._world = world or current_world()
        self.rounds: list[dict[str, Any]] = []
        self._steps = 0
        self._loop = -1
        self._of_loop = 0
        self._last, self._waited = clock(), self._waited_so_far()
        self._forget()

    def _forget(self) -> None:
        """A look begins."""
        self._busy, self._samples, self._counted = 0.0, 0, 0

    def _waited_so_far(self) -> float:
        return float(self._model.stats().exposed_seconds) if self._model is not None else 0.0

    def step(self, busy: float | None = None) -> None:
        """A step is over. Collective every ``every`` steps.

        Args:
            busy: Seconds that this rank computed in it; default the time since the last call, less
                what the model waited for others meanwhile. (The first step of an epoch is not
                counted then: before it other things were done.)
        """
        now, waited = self._clock(), self._waited_so_far()
        begins = self._batches.loops != self._loop
        if begins:
            self._loop, self._of_loop = self._batches.loops, 0
        if busy is not None or not begins:
            self._busy += (now - self._last) - (waited - self._waited) if busy is None else busy
            self._samples += self._batches.part_lengths[self._of_loop]
            self._counted += 1
        self._of_loop += 1
        self._steps += 1
        if self._every and self._steps % self._every == 0:
            self.rebalance()
            now, waited = self._clock(), self._waited_so_far()
        self._last, self._waited = now, waited

    def rebalance(self) -> bool:
        """Look at what was measured since the last look, and move shares. Collective.

        They count from the next batch on that no rank has drawn yet.

        Returns:
            Whether shares changed.
        """
        steps = max(1, self._counted)
        mine = [max(self._busy, 0.0) / steps, self._samples / steps, self._batches.drawn]
        everyones = numpy.array(gather_json(mine, world=self._world))
        seconds, samples, drawn = everyones.T
        ahead = int(drawn.max())  # ranks may have drawn differently far, but all go by this one
        shares = numpy.array(self._batches.shares_at(ahead))
        self.rounds.append(
            {"step": self._steps, "shares": shares.tolist(), "seconds": seconds.tolist()}
        )
        self._forget()
        measured = (seconds > 0) & (samples > 0)
        if not measured.any() or seconds.max() <= seconds.mean() * (1 + self._tolerance):
            return False
        speeds = numpy.where(measured, samples / numpy.maximum(seconds, 1e-12), 0.0)
        known = shares[measured].sum()  # what these have now is theirs to share
        wanted = numpy.where(measured, speeds / speeds.sum() * known, shares)
        weights = (1 - self._smoothing) * shares + self._smoothing * wanted
        weights = numpy.maximum(weights, SMALLEST / len(weights))
        self._batches.set_shares(weights.tolist(), ahead)
        return True

    def save(self, path: str | Path) -> None:
        """Write ``rounds`` for ``mpiddl data report --times``, on rank 0.

        Raises:
            OSError: It cannot be written.
        """
        if self._world.rank == 0:
            report = {"format": FORMAT, "ranks": self._world.size, "rounds": self.rounds}
            Path(path).write_text(json.dumps(report))
