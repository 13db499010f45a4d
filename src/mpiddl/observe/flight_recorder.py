"""Where this rank's events are kept: the flight recorder of the job, or a trace.

The flight recorder is a folder of the job in the system's folder for temporary files, with one
file for each rank of the node. It is removed when the job ends well, and kept when it does not.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

from mpiddl.base.log import logger
from mpiddl.errors import NotInitializedError, RecordingError
from mpiddl.launch.exit import at_clean_exit, say_last
from mpiddl.observe.event_files import TRACE_EVENTS, EventFile, in_use
from mpiddl.observe.events import recorder
from mpiddl.observe.heartbeats import Heartbeats
from mpiddl.observe.job import Job

__all__ = ["begin", "current_job", "heartbeats", "hint", "trace_into"]

KEPT_SECONDS = 3 * 24 * 3600
"""How long what a failed job has left is kept."""

_job: Job | None = None
_file: EventFile | None = None
_heartbeats: Heartbeats | None = None
_told = False


def begin(job: Job, heartbeats: Heartbeats | None) -> None:
    """Keep this rank's events in a file from now on.

    Args:
        job: Facts about the ranks.
        heartbeats: The signs of life of this node's ranks; None without shared memory.
    """
    global _heartbeats, _job, _told
    _job, _heartbeats = job, heartbeats
    offset, error = job.clock
    recorder.describe(
        job=job.name,
        rank=job.rank,
        size=job.size,
        host=job.host,
        pid=os.getpid(),
        node_rank=job.node_rank,
        versions=_versions(job.mpi),
        clock={"offset": offset, "error": error},
        started={"monotonic": time.monotonic_ns(), "since_1970": time.time_ns()},
    )
    if job.trace:
        trace_into(Path(job.trace))
    elif not recorder.tracing:
        _keep_last_events(job)
    if not _told:
        say_last(hint)
        at_clean_exit(_leave)
        _told = True


def heartbeats() -> Heartbeats | None:
    """The signs of life of this node's ranks; None for a single rank, or without shared memory."""
    return _heartbeats


def current_job() -> Job | None:
    """Facts about the ranks; None before ``mpiddl.init()``."""
    return _job


def hint() -> str:
    """Where people find the events of this job's ranks."""
    if _file is None:
        return "no flight recorder: its folder could not be made"
    return f"what each rank did last: mpiddl trace show {_file.path.parent}"


def trace_into(folder: Path) -> None:
    """Keep all events in ``folder`` from now on; files of an earlier run are replaced.

    Raises:
        NotInitializedError: Before ``mpiddl.init()``.
        RecordingError: The folder cannot be written.
        ValueError: This rank is tracing into another folder.
    """
    job = _job
    if job is None:
        raise NotInitializedError("call mpiddl.init() first, on every rank")
    folder = folder.absolute()
    if recorder.tracing and _file is not None:
        if _file.path.parent != folder:
            raise ValueError(f"already tracing into {_file.path.parent}; a job has one trace")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if job.local_rank == 0:
            for path in folder.glob("rank-*.events"):
                if int(path.stem.removeprefix("rank-")) >= job.size:
                    path.unlink(missing_ok=True)
        file = EventFile(folder / f"rank-{job.rank}.events", TRACE_EVENTS)
    except (OSError, ValueError) as error:
        raise RecordingError(
            f"rank {job.rank} on {job.host}: no trace can be written into {folder}: {error}"
        ) from None
    _replace(file)
    recorder.tracing = True


def _replace(file: EventFile) -> None:
    global _file
    _remove()
    file.take_over(recorder)
    _file = file


def _remove() -> None:
    """The flight recorder's file, and its folder if this rank is the last one in it."""
    global _file
    if _file is not None and not recorder.tracing:
        with contextlib.suppress(OSError):
            _file.path.unlink(missing_ok=True)
            _file.path.parent.rmdir()
        _file = None


def _leave() -> None:
    if _heartbeats is not None:
        _heartbeats.leave()
    _remove()


def _keep_last_events(job: Job) -> None:
    try:
        parent = _own_folder()
        if job.local_rank == 0:
            _clean_up(parent)
        folder = parent / job.name
        folder.mkdir(exist_ok=True)
        _replace(EventFile(folder / f"rank-{job.rank}.events"))
    except OSError as error:
        if job.local_rank == 0:
            logger.warning("events are kept in memory only and lost with a killed rank: %s", error)


def _own_folder() -> Path:
    """This user's folder for flight recorders."""
    folder = Path(tempfile.gettempdir()) / f"mpiddl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()  # anybody may make a link in a folder for everybody
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def _clean_up(parent: Path) -> None:
    """Remove what jobs left days ago."""
    oldest = time.time() - KEPT_SECONDS
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime < oldest and not any(map(in_use, folder.iterdir())):
                shutil.rmtree(folder)


def _versions(mpi: str) -> dict[str, str | None]:
    loaded = {name: sys.modules.get(name) for name in ("mpiddl", "torch")}
    return {
        **{name: getattr(module, "__version__", None) for name, module in loaded.items()},
        "python": platform.python_version(),
        "mpi": mpi,
    }
