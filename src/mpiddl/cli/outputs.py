"""Files that a benchmark writes, on rank 0. Both functions are collective."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from mpiddl.errors import OutputError

__all__ = ["refuse_files", "write_files"]

PICTURES = (".png", ".pdf", ".svg")


def refuse_files(*paths: Path | None, plot: Path | None) -> None:
    """Before anything is measured, not after. Only rank 0 writes: its node alone counts.

    Raises:
        OutputError: On every rank.
    """
    from mpiddl.overlap.calls import broadcast_json

    problem = None
    for path in paths:
        if path is not None and not path.parent.is_dir():
            problem = f"{path} cannot be written: there is no folder {path.parent}"
        elif path is not None and path.is_dir():
            problem = f"{path} cannot be written: it is a folder"
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        problem = "--plot needs matplotlib: pip install 'mpiddl[plots]'"
    if plot is not None and plot.suffix.lower() not in PICTURES:
        problem = f"{plot} cannot be drawn: its name must end in {', '.join(PICTURES)}"
    problem = broadcast_json(problem)
    if problem:
        raise OutputError(problem)


def write_files(writers: Mapping[Path | None, Callable[[Path], None]]) -> None:
    """Write each file that was asked for.

    Raises:
        OutputError: On every rank.
    """
    from mpiddl.comm.world import current_world
    from mpiddl.overlap.calls import broadcast_json

    problem = None
    for path, write in writers.items():
        try:
            if path is not None and current_world().rank == 0:
                write(path)
        except OSError as error:
            problem = problem or f"{path} cannot be written: {error.strerror}"
    problem = broadcast_json(problem)
    if problem:
        raise OutputError(problem)
