"""RANK, WORLD_SIZE and LOCAL_RANK, for libraries that look for torchrun's variables.

Under mpirun and srun nobody sets them, and a library that divides its data by them (webdataset,
say) gives every rank all of it. Processes that a rank starts, such as loader workers, inherit them.
MASTER_ADDR is none of them: who looks for it would take torchrun for the launcher.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from mpiddl.base.log import logger

__all__ = ["offer", "offered", "withdraw"]

_offered: dict[str, str] = {}


def offer(
    rank: int, size: int, local_rank: int, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Set the three, unless somebody else has set one of them: they belong together.

    A rank alone needs none, and would be taken for one of many.
    """
    withdraw(environ)
    wanted = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    if any(name in environ for name in wanted):
        theirs = {name: environ.get(name) for name in ("RANK", "WORLD_SIZE")}
        if size > 1 and rank == 0 and theirs != {"RANK": "0", "WORLD_SIZE": str(size)}:
            logger.warning(
                "this is rank 0 of %d, but the environment has RANK=%s WORLD_SIZE=%s: libraries "
                "that read them may give ranks the same data; unset RANK, WORLD_SIZE and "
                "LOCAL_RANK, and mpiddl sets them",
                size,
                *theirs.values(),
            )
    elif size > 1:
        environ.update(wanted)
        _offered.update(wanted)


def withdraw(environ: MutableMapping[str, str] = os.environ) -> None:
    """Remove what ``offer`` has set and nobody has changed."""
    for name, text in _offered.items():
        if environ.get(name) == text:
            del environ[name]
    _offered.clear()


def offered() -> dict[str, str]:
    """What is offered now: for processes that do not inherit this one's environment."""
    return dict(_offered)
