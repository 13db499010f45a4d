"""How much of a test's parameters a run takes: pairs of values by default, all at night.

Faults that need three particular values at once are rare: a set of cases in which every *pair* of
values of two parameters occurs finds nearly all that the full product finds (Kuhn, Wallace & Gallo,
IEEE Trans. Software Eng. 30(6), 2004), and is many times smaller. ``--matrix full`` takes all.

Where each case starts a job, ``@pytest.mark.by_day(2)`` takes two of them, and ``by_day(0)`` leaves
a test to the night.

Which cases represent the pairs, and what hypothesis draws, follows from ``--hypothesis-seed``; each
pass of the suite has its own, so that together they see more than one pass does.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, Phase, settings

_full = False
_seed = 0


def choose_matrix(config: pytest.Config) -> None:
    """Take the run's options into account from now on; called before test modules are imported."""
    global _full, _seed
    _full = config.getoption("matrix") == "full"
    _seed = int(config.option.hypothesis_seed)
    # A busy machine is slow, and hypothesis would call the test so.
    busy = [HealthCheck.too_slow]
    settings.register_profile("mpiddl", database=None, deadline=None, suppress_health_check=busy)
    settings.load_profile("mpiddl")
    # For --hypothesis-profile, where it is enough to know that something fails.
    settings.register_profile("no-shrinking", phases=[Phase.explicit, Phase.generate])


def times(most: int) -> int:
    """How often something is repeated: ``most`` times with the full matrix, else a quarter."""
    return most if _full else -(-most // 4)


def examples(most: int) -> settings:
    """Settings of a hypothesis test that draws ``times(most)`` examples."""
    return settings(max_examples=times(most))


def seeds(count: int) -> list[int]:
    """Values of a parameter ``seed``: ``count`` with the full matrix, else one of this run's."""
    return list(range(count)) if _full else [_seed % count]


def thin(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Choose items such that every pair of parameter values that occurs in a test is run.

    Returns:
        The chosen ones, in their order, and the others.
    """
    if _full:
        return items, []
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    chosen: set[pytest.Item] = set()
    for name, cases in tests.items():
        chance = random.Random(f"{_seed} {name}")
        by_day = cases[0].get_closest_marker("by_day")
        few = by_day is not None and by_day.args[0] < len(cases)
        chosen.update(chance.sample(cases, by_day.args[0]) if few else _cover(cases, chance))
    kept = [item for item in items if item in chosen]
    return kept, [item for item in items if item not in chosen]


def _cover(cases: list[pytest.Item], chance: random.Random) -> list[pytest.Item]:
    """A greedy choice: each next case is the one that brings most pairs not seen yet."""
    pairs = {case: _pairs(case) for case in cases}
    left = set().union(*pairs.values())
    if not left:  # one parameter, or none
        return cases
    chance.shuffle(cases)
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs[case] & left))
        chosen.append(best)
        left -= pairs[best]
    return chosen


def _pairs(case: pytest.Item) -> set[tuple]:
    """Pairs of (parameter, value); a value is the same object in all cases of a test."""
    values = getattr(getattr(case, "callspec", None), "params", {})
    marks = [(name, id(value)) for name, value in sorted(values.items())]
    return set(itertools.combinations(marks, 2))
