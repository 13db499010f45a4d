"""Waits that are done later than they are, so that ranks meet in other orders."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest

from mpiddl.api import all_reduce, call
from mpiddl.engine.engine import Engine


class _Late:
    """Done at the earliest when it was asked so many times."""

    def __init__(self, wait, times):
        self.wait, self.times = wait, times

    def done(self):
        self.times -= 1
        return self.times < 0 and self.wait.done()


def late(waits, chance):
    """The same collective, each wait of which is late."""
    try:
        wait = next(waits)
        while True:
            yield _Late(wait, chance.choice([0, 0, 1, 3, 20, 120]))
            wait = next(waits)
    except StopIteration as end:
        return end.value


class LateEngine(Engine):
    """Delays every collective by chance; another chance on every rank."""

    def __init__(self, seed, rank):
        super().__init__()
        self.chance = random.Random(f"{seed} {rank}")

    def submit(self, waits, *rest, **named):
        return super().submit(late(waits, self.chance), *rest, **named)

    def run(self, waits, *rest):
        return super().run(late(waits, self.chance), *rest)


@contextmanager
def delayed(world, seed):
    """The public calls go through a ``LateEngine``; no short ways."""
    engine = LateEngine(seed, world.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "engine_of", lambda world: engine)
        patch.setattr(all_reduce, "short_way_of", lambda world: None)
        yield engine
