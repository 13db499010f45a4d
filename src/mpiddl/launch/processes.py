"""Which processes of a job may start MPI."""

from __future__ import annotations

import multiprocessing
import os
import sys

from mpiddl.errors import LaunchError

__all__ = ["refuse_child_process"]

_owner = os.getpid()


def _is_importing_main() -> bool:
    """Whether a spawned or forkserver child is still importing the parent's main module."""
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def refuse_child_process(running: bool) -> None:
    """MPI belongs to the process that the launcher started.

    Args:
        running: ``init()`` has succeeded, in this process or in one that it was forked from.

    Raises:
        LaunchError: This is another one.
    """
    torch_data = sys.modules.get("torch.utils.data")
    if torch_data is not None and torch_data.get_worker_info() is not None:
        where = "a DataLoader worker"
    elif multiprocessing.parent_process() is not None or _is_importing_main():
        where = "a multiprocessing child"
    elif running and os.getpid() != _owner:
        where = "a forked child of a rank"
    else:
        return
    raise LaunchError(
        f"mpiddl.init() was called in {where}; call it in the main process of each rank only, "
        "under `if __name__ == '__main__':`, and keep it out of modules that the data set imports"
    )
