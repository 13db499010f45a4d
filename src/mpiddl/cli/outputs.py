"""Files that commands write; what a benchmark writes, on rank 0."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from mpiddl.errors import OutputError

__all__ = ["check_picture", "refuse_files", "write_files"]

PICTURES = (".png", ".pdf", ".svg")


def refuse_files(*paths: Path | None, plot: Path | None) -> None:
    """Before anything is measured, not after. Collective. Rank 0 alone writes: its node counts.

    Raises:
        OutputError: On every rank.
    """
    from mpiddl.api.objects import broadcast_json

    problem = None
    given = [path for path in paths if path is not None]
    places = [path.resolve() for path in given]
    for path, place in zip(given, places, strict=True):
        if not path.parent.is_dir():
            problem = f"{path} cannot be written: there is no folder {path.parent}"
        elif path.is_dir():
            problem = f"{path} cannot be written: it is a folder"
        elif places.count(place) > 1:
            problem = f"{path} was given twice: one file would replace the other"
    if plot is not None:
        try:
            check_picture(plot)
        except OutputError as error:
            problem = str(error)
    problem = broadcast_json(problem)
    if problem:
        raise OutputError(problem)


def check_picture(path: Path) -> None:
    """Whether this machine can draw, and knows the format.

    Raises:
        OutputError: On this rank.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("plots need matplotlib: pip install 'mpiddl[plots]'")
    if path.suffix.lower() not in PICTURES:
        raise OutputError(f"{path} cannot be drawn: its name must end in {', '.join(PICTURES)}")


def write_files(writers: Mapping[Path | None, Callable[[Path], None]]) -> None:
    """Write each file that was asked for. Collective.

    Raises:
        OutputError: On every rank.
    """
    from mpiddl.api.objects import broadcast_json
    from mpiddl.comm.world import current_world

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
