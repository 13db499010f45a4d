"""What one rank cannot do fails on all of them, with one message."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, cast

from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World, current_world
from mpiddl.errors import CheckpointError, DataError
from mpiddl.observe import activity

__all__ = ["Tick", "everywhere", "raise_together", "work_together"]

P = ParamSpec("P")
T = TypeVar("T")

Tick = Callable[[], None]
"""What long work calls after each piece of it."""

SIGN_SECONDS = 5.0
"""Between two signs that long work goes on, at most."""


def everywhere(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """``function(*args, **options)``, on every rank; collective over the ranks of ``init()``.

    For reading data: a file that is missing or broken on one rank ends in the same error on all.

        images = mpiddl.data.everywhere(mpiddl.data.read_idx, "train-images-idx3-ubyte.gz")

    Raises:
        DataError: On every rank, if ``function`` raised OSError or ValueError on one; it names the
            first such rank and its host where not all failed alike.
    """
    problem, result = None, None
    try:
        result = function(*args, **options)
    except (OSError, ValueError) as error:
        problem = str(error)
    raise_together(problem)
    return result  # type: ignore[return-value]


def raise_together(
    problem: str | None,
    world: World | None = None,
    kind: type[DataError | CheckpointError] = DataError,
) -> None:
    """Raise an error on every rank if one of them has a problem. Collective.

    Args:
        problem: A message about what went wrong on this rank; None if all went well.
        world: The ranks; default those of ``mpiddl.init()``.
        kind: The class of the error.
    """
    world = world or current_world()
    found = gather_json([problem, world.hostname], world=world)
    error = _first_error(found, kind)
    if error is not None:
        raise error


def work_together(
    work: Callable[[Tick], T],
    world: World | None = None,
    kind: type[DataError | CheckpointError] = DataError,
) -> T:
    """``work(tick)`` on every rank, however long it takes. Collective; fails on all or none.

    Ranks that are through wait for the others, as long as these move: ``work`` calls ``tick`` after
    each piece, and every few seconds that becomes a message to all, which every watchdog sees. Work
    that no longer calls it is stuck, and ends the job after MPIDDL_TIMEOUT.

    Args:
        work: A function that does this rank's part; ranks may do different things, or nothing.
        world: The ranks; default those of ``mpiddl.init()``.
        kind: The class of the error.

    Returns:
        The result of this rank's ``work``.

    Raises:
        DataError, CheckpointError: Of this ``kind``, on every rank, once all are through:
            ``work`` raised on one.
    """
    world = world or current_world()
    result, caught = None, None
    try:
        result = work(_Signs(world).tick)
    except Exception as error:
        caught = error
    problem = None if caught is None else str(caught) or type(caught).__name__
    found = _meet(True, problem, world)
    while not all(through for through, *_ in found):
        found = _meet(True, problem, world)
    failure = _first_error([told for _, *told in found], kind)
    if failure is not None:
        raise failure from caught
    return cast(T, result)


class _Signs:
    """Tells the other ranks every few seconds that this one moves.

    Args:
        world: The ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # A few signs before anybody who waits for them gives up.
        self._every = min(SIGN_SECONDS, (world.settings.timeout or SIGN_SECONDS) / 4)
        self._due = time.monotonic() + self._every

    def tick(self) -> None:
        """A piece of the work is done."""
        if time.monotonic() >= self._due:
            _meet(False, None, self._world)
            self._due = time.monotonic() + self._every


def _meet(through: bool, problem: str | None, world: World) -> list[list[object]]:
    """Gather one line about each rank's work. Collective, so ranks that still work come here as
    often as those that are through."""
    found = gather_json([through, problem, world.hostname], world=world)
    activity.moved()
    return cast("list[list[object]]", found)


def _first_error(
    found: Sequence[Sequence[object]], kind: type[DataError | CheckpointError]
) -> DataError | CheckpointError | None:
    """The error to raise for ``found``: of each rank its problem, if it has one, and its host."""
    failed = [rank for rank, (text, _) in enumerate(found) if text is not None]
    if not failed:
        return None
    text, host = found[failed[0]]
    alike = len({words for words, _ in found}) == 1
    return kind(f"{text}" if alike else f"rank {failed[0]} on {host}: {text}", on_every_rank=True)
