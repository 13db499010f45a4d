"""Bucket size and engine by measurement, in the first steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from mpiddl.base.log import logger
from mpiddl.base.units import format_bytes
from mpiddl.comm.tuning import read_training, write_training
from mpiddl.comm.world import World
from mpiddl.engine.control import Control
from mpiddl.engine.engine import may_thread
from mpiddl.strategies.options import Options

__all__ = ["Calibration", "Choice", "fastest"]

SIZES = (4 << 20, 1 << 20, 16 << 20)
WARM_UP = 2
"""Backwards before anything is measured: memory is touched for the first time, caches fill."""
STEPS = 4
"""Backwards with each choice; the time before the first still belongs to the choice before."""
CLEARLY = 1.02
"""Another choice than the first must be better by this."""


class Choice(NamedTuple):
    """A choice that is made by measuring.

    Attributes:
        bucket_size: In bytes.
        engine: The name of what drives buckets.
    """

    bucket_size: int
    engine: str

    def __str__(self) -> str:
        return f"bucket_size={format_bytes(self.bucket_size)}, engine={self.engine}"


class Calibration:
    """Tries each choice for a few steps, then stays with the fastest.

    All ranks switch after the same backward, and come to the same conclusion. Where MPIDDL_TUNE
    names a file, it is kept there, and the next job with this model on such ranks begins with it.

    Args:
        options: The user's options; what was chosen there is not tried.
        world: The ranks.
        control: Carries the ranks' times.
        model: A fingerprint of the model.
        kind: The kind of device that it is on, ``"cpu"`` or ``"cuda"``.
    """

    def __init__(
        self, options: Options, world: World, control: Control, model: str, kind: str
    ) -> None:
        self._world = world
        self._control = control
        self._model = model
        self._kind = kind
        self._choices = self._known(self._choices_of(options))
        self._backwards = -WARM_UP
        self._ended = 0.0
        self._seconds: list[list[float]] = [[] for _ in self._choices]
        self.present = self._choices[0]

    def _choices_of(self, options: Options) -> list[Choice]:
        world, engines = self._world, [options.engine]
        if options.engine == "auto":
            # Within a node the memory that backward needs is what the exchange needs too; there is
            # little to hide, and much to disturb. A network leaves the processor alone.
            engines = ["after", "inline", "thread"]
            if world.num_nodes > 1:
                engines = ["thread", "inline"]
        if "thread" in engines and not all(self._control.gather_json(may_thread(world))):
            engines = [engine for engine in engines if engine != "thread"] or ["inline"]
        sizes = SIZES if options.bucket_size is None else (options.bucket_size,)
        choices = [Choice(size, engine) for size in sizes for engine in engines]
        return choices if world.size > 1 else choices[:1]

    def _known(self, choices: list[Choice]) -> list[Choice]:
        """The choice that an earlier job found best, if it is one of these; else all."""
        if len(choices) == 1:
            return choices
        found = None
        if self._world.rank == 0:
            file, layout = self._world.settings.tune, self._world.layout
            found = read_training(file, layout, self._model, self._kind)
        found = self._control.broadcast_json(found)
        return [choice for choice in choices if choice._asdict() == found] or choices

    def settle(self, found: Any) -> None:
        """Stay with a choice that an earlier job settled for, if it can be chosen here."""
        kept = [choice for choice in self._choices if choice._asdict() == found]
        if kept:
            self._choices, self.present = kept, kept[0]

    @property
    def settled(self) -> bool:
        """Whether nothing is tried any more."""
        return len(self._choices) == 1

    def after_backward(self) -> Choice | None:
        """The choice for the next backward, if that is another one. Collective at the end."""
        if len(self._choices) == 1:
            return None
        began, self._ended = self._ended, time.perf_counter()
        trial, step = divmod(self._backwards, STEPS)
        self._backwards += 1
        if trial >= 0 and step > 0:
            self._seconds[trial].append(self._ended - began)
        if self._backwards < 0 or self._backwards % STEPS:
            return None
        more = trial + 1 < len(self._choices)
        chosen = self._choices[trial + 1] if more else self._conclude()
        changed = chosen != self.present
        self.present = chosen
        return chosen if changed else None

    def _conclude(self) -> Choice:
        medians = [statistics.median(seconds) for seconds in self._seconds]
        best = fastest(self._control.gather_json(medians))
        chosen, self._choices = self._choices[best], [self._choices[best]]
        if self._world.rank == 0:
            logger.info("measured in the first steps: %s", chosen)
            file, layout = self._world.settings.tune, self._world.layout
            try:
                write_training(file, layout, self._model, chosen._asdict(), self._kind)
            except OSError as error:
                logger.warning("%s cannot be written: %s", file, error.strerror)
        return chosen


def fastest(seconds: Sequence[Sequence[float]]) -> int:
    """Number of the choice with which the slowest rank is fastest; the first, unless another is
    clearly better.

    Args:
        seconds: The times of each choice, by rank.
    """
    slowest = [max(of_ranks) for of_ranks in zip(*seconds, strict=True)]
    best = min(range(len(slowest)), key=slowest.__getitem__)
    return best if slowest[best] * CLEARLY < slowest[0] else 0
