"""What one rank cannot do fails on all of them, with one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mpiddl.comm.world import World, current_world
from mpiddl.errors import CheckpointError, DataError
from mpiddl.overlap.calls import gather_json

__all__ = ["everywhere", "raise_together"]

P = ParamSpec("P")
T = TypeVar("T")


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
        problem: What went wrong on this rank; None: nothing.
        world: The ranks; default those of ``mpiddl.init()``.
        kind: Of the error.
    """
    world = world or current_world()
    found = gather_json([problem, world.hostname], world=world)
    failed = [rank for rank, (text, _) in enumerate(found) if text is not None]
    if not failed:
        return
    text, host = found[failed[0]]
    alike = len({words for words, _ in found}) == 1
    raise kind(text if alike else f"rank {failed[0]} on {host}: {text}", on_every_rank=True)
