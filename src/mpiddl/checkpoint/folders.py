"""Where checkpoints are: one folder each, which is there as a whole or not at all.

checkpoints/
    step-000000120/
        index.json               what is in it, and the files' checksums
        part-000.safetensors     tensors; as many files as ranks wrote
        ranks.safetensors        what is a rank's own, where rank 0 alone writes
    step-000000180/
    .writing-step-000000240-1f2e3d4c/   begun by a job that was killed; the next save removes it
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from mpiddl.api.fail_together import Tick
from mpiddl.base.log import logger
from mpiddl.checkpoint.index import read_index
from mpiddl.checkpoint.tensors import nothing
from mpiddl.errors import CheckpointError

__all__ = [
    "WRITING",
    "begin_folder",
    "checkpoints",
    "finish_folder",
    "flush_folder",
    "latest",
    "newest",
    "remove",
    "remove_old",
]

WRITING = ".writing-"
ABANDONED = "abandoned-"
_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")


def checkpoints(folder: str | Path) -> list[Path]:
    """All that are in a folder, the newest last; broken ones too."""
    found = []
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            found.append((int(match[1]), int(match[2] or 1), Path(folder) / name))
    return [path for *_, path in sorted(found)]


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole; None if there is none. Not collective.

    Every file is read once and held against its checksum. What is truncated, corrupted or foreign
    is reported, and the one before it is taken.

    Raises:
        OSError: The folder cannot be read.
    """
    return newest(folder, nothing)


def newest(folder: str | Path, tick: Tick) -> Path | None:
    """As ``latest``; calls ``tick`` after each piece that was read."""
    for path in reversed(checkpoints(folder)):
        try:
            read_index(path).verify(path, tick)
        except CheckpointError as error:
            logger.warning("%s; the checkpoint before it is taken", error)
            continue
        return path
    return None


def begin_folder(folder: Path, step: int, tick: Tick = nothing) -> Path:
    """A new place to write to. What killed jobs have left behind goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)
        tick()
    path = folder / f"{WRITING}step-{step:09d}-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def finish_folder(written: Path, folder: Path, step: int) -> Path:
    """Give what was written its name, at once, for good.

    Raises:
        OSError: It could not be done; what was written has its old name.
    """
    flush_folder(written)
    name = f"step-{step:09d}"
    number = 1
    while (folder / name).exists():  # the same step once more: never without the one before
        number += 1
        name = f"step-{step:09d}-{number}"
    path = folder / name
    written.rename(path)
    try:
        flush_folder(folder)
    except OSError:
        path.rename(written)
        raise
    return path


def flush_folder(folder: Path) -> None:
    """Names of files survive a power cut only once their folder is flushed."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_old(folder: Path, keep: int, just: Path, tick: Tick = nothing) -> None:
    """All but ``just``, the one that was written last, and the newest of those before it.

    Those with a later step are of another course of the job, which began anew from an earlier one,
    or broken. They keep their files, but not their names: nobody is to go on from them by mistake.
    """
    found = checkpoints(folder)
    at = found.index(just)
    for path in found[at + 1 :]:
        aside = path.with_name(f"{ABANDONED}{path.name}-{secrets.token_hex(4)}")
        path.rename(aside)
        logger.warning("%s is of another course of this job; it is %s now", path, aside.name)
    for path in found[: max(0, at + 1 - keep)]:
        remove(path)
        tick()


def remove(path: Path) -> None:
    """A checkpoint; half of one is never found."""
    gone = path.with_name(f"{WRITING}{path.name}-old")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
