"""Loads the MPI library, and sets what must be set before it loads.

Importing ``mpi4py.MPI`` initialises MPI, so it happens here, inside a function, and nowhere
else: importing mpiddl starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from mpiddl.errors import NoMpiError
from mpiddl.launch.launchers import Launch

__all__ = [
    "EAGER_BYTES",
    "EAGER_LIMIT",
    "defaults",
    "describe",
    "library_name",
    "library_path",
    "load",
    "mapped_file",
    "set_defaults",
]


EAGER_LIMIT = "OMPI_MCA_btl_tcp_eager_limit"
EAGER_BYTES = 528 << 10
"""Open MPI over TCP sends messages of up to this without asking the receiver: a default chunk."""


_defaults: dict[str, str] = {}


def set_defaults(environ: MutableMapping[str, str], launch: Launch) -> dict[str, str]:
    """MPI settings that every user would have to know, where the user has not chosen.

    They must be in the environment before the library loads. Returns those that were set.
    """
    # One-sided over UCX prints an error at every shared window of Open MPI's wheel, and shared
    # windows do not use it.
    wanted = {"OMPI_MCA_osc": "^ucx"}
    # More ranks than cores: a rank that spins keeps its peer from sending what it spins for.
    if (launch.local_size or 1) > _cores_of_node():
        wanted["OMPI_MCA_mpi_yield_when_idle"] = "1"
    if launch.size is not None and launch.size == launch.local_size:
        # Intel MPI looks for a network first, although all ranks are on one node.
        wanted["I_MPI_FABRICS"] = "shm"
        # Open MPI 5 sleeps for a second when it closes what looks for one (libfabric). Version 4
        # is often told to leave openib out, which this setting would replace.
        wanted["OMPI_MCA_btl"] = "^ofi,openib"
    else:
        # A message above the limit waits until the receiver's MPI is called and answers. The link
        # is idle meanwhile, and a receiver that computes is long in answering.
        wanted[EAGER_LIMIT] = str(EAGER_BYTES)
    chosen = {name: text for name, text in wanted.items() if name not in environ}
    environ.update(chosen)
    return chosen


def _cores_of_node() -> int:
    """Cores that the ranks of this node may run on, as far as one of them knows before they meet:
    it may be bound to a few of those that its launcher may use."""
    cores = os.sched_getaffinity(0)
    with suppress(OSError):
        cores |= os.sched_getaffinity(os.getppid())
    return len(cores)


def load(launch: Launch) -> ModuleType:
    """Import ``mpi4py.MPI`` (which initialises MPI, if nobody has) and return it.

    Raises:
        NoMpiError: No MPI library was found.
    """
    _defaults.update(set_defaults(os.environ, launch))
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NoMpiError(reason) from error
    return MPI


def defaults() -> dict[str, str]:
    """Settings of this process's MPI that ``load`` made: name -> value."""
    return dict(_defaults)


def library_name(version: str) -> str:
    """``MPI_Get_library_version``'s text -> name and version: ``"Open MPI v5.0.11"``."""
    text = " ".join(version.replace("\0", " ").split())
    patterns = (
        r"(Open MPI v[\w.]+)",
        r"(Intel\(R\) MPI Library [\w.]+)",
        r"(CRAY MPICH [Vv]ersion [\w.]+)",
        r"(MVAPICH\d?)(?:-\w+)? [Vv]ersion\s*:\s*([\w.]+)",
        r"(MPICH) Version:\s*([\w.]+)",
    )
    for pattern in patterns:
        if match := re.search(pattern, text):
            return " ".join(match.groups())
    return text[:60]


_LIBRARY = re.compile(
    r"\s(/\S*/libmpi(?:ch|_cray|_(?:gnu|intel|nvidia|amd)_\w+)?(?:\.so[\d.]*))$", re.MULTILINE
)


def library_path() -> str | None:
    """File of the MPI library in this process, as the kernel mapped it; None if unknown."""
    return mapped_file(_LIBRARY)


def mapped_file(pattern: re.Pattern[str]) -> str | None:
    """The file in this process's memory whose line in the kernel's table matches."""
    maps = Path("/proc/self/maps")
    match = pattern.search(maps.read_text()) if maps.exists() else None
    return match.group(1) if match else None


def describe() -> dict[str, str | None]:
    """Name, file and thread level of the MPI library that runs."""
    from mpi4py import MPI

    levels = {
        MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
        MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
        MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
        MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
    }
    return {
        "library": library_name(MPI.Get_library_version()),
        "path": library_path(),
        "thread_level": levels[MPI.Query_thread()],
    }
