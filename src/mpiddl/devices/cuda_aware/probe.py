"""Can this MPI read GPU memory? What the user says, what the library says, else what a test finds.

A wrong "yes" ends in a segmentation fault, a wrong "no" costs speed. So a library is believed where
its answer is known to mean what we need; all others are tried, in processes that may crash.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpiddl.base.log import logger
from mpiddl.base.units import format_bytes
from mpiddl.devices.cuda_aware import cache as probe_cache
from mpiddl.devices.cuda_aware import facts
from mpiddl.devices.cuda_aware.hints import CudaAwareness, Evidence, hint
from mpiddl.devices.cuda_aware.trial import Outcome, run_test

__all__ = ["CudaAwareness", "cuda_awareness", "staging_verdict", "verdict_of"]

TIMEOUT = 60.0
"""Seconds for the test; it takes two to five where all is well."""

DOUBT_SECONDS = 24 * 3600.0
"""For how long a test that hung counts. Not for ever: the node may have been busy. Nor for one job
alone: each would wait for it again."""

RETRY_SECONDS = 600.0
"""For how long it counts that the test could not start: for the other ranks of the job."""


def staging_verdict(
    setting: str,
    library: str,
    path: str | None,
    device: int,
    environ: Mapping[str, str] = os.environ,
    *,
    test: bool = True,
    timeout: float = TIMEOUT,
    options: Sequence[str] = (),
) -> CudaAwareness:
    """Whether GPU memory may be given to MPI. Call it after MPI_Init, on one rank of each node.

    Args:
        setting: MPIDDL_STAGING: ``device`` and ``host`` decide, ``auto`` looks.
        library: The MPI library's name and version.
        path: Its file, as mapped into this process.
        device: The GPU that a test may use, as CUDA counts.
        environ: This process's.
        test: Whether child processes may try it, where the library's word is not enough.
        timeout: Seconds for that.
        options: More arguments of the child processes.
    """
    if setting != "auto":
        return CudaAwareness("yes" if setting == "device" else "no", f"MPIDDL_STAGING={setting}")
    told = cuda_awareness(library, path, environ)
    if told.answer != "unknown":
        return told
    file = probe_cache.cache_file(platform.node(), environ)
    key = probe_cache.fingerprint(_circumstances(library, path, environ))
    known = probe_cache.recall(file, key)
    if known is not None and known[0] in ("yes", "no", "unknown"):
        answer: Any = known[0]
        return CudaAwareness(answer, f"{known[1]} (known from {file}; remove it to test again)")
    if not test:
        return told
    logger.info("trying whether %s reads GPU memory (%s)", library, told.reason)
    outcome = run_test(library, path, device, environ, timeout, options)
    verdict = verdict_of(outcome)
    seconds = DOUBT_SECONDS if outcome.timed_out else None if outcome.ready else RETRY_SECONDS
    probe_cache.remember(file, key, *verdict, library, seconds)
    return verdict


def verdict_of(outcome: Outcome) -> CudaAwareness:
    """What the test's end means. Only what happens once memory and ranks are there is an answer."""
    between = (
        "between two ranks on one GPU"
        if outcome.ranks == 2
        else "from a rank to itself (no mpirun of this MPI could start two)"
    )
    if not outcome.ready:
        return CudaAwareness("unknown", f"the test could not start: {outcome.problem}")
    if outcome.problem is None:
        largest = format_bytes(outcome.passed)
        return CudaAwareness("yes", f"tested: messages up to {largest} arrived {between}")
    reached = f"up to {format_bytes(outcome.passed)} arrived" if outcome.passed else "none arrived"
    return CudaAwareness("no", f"tested: of messages {between} {reached}, then: {outcome.problem}")


def _circumstances(library: str, path: str | None, environ: Mapping[str, str]) -> dict[str, object]:
    """All that a test's answer depends on."""
    files = [path, facts.mapped_file("libucp"), facts.mapped_file("libfabric")]
    return {
        "hostname": platform.node(),
        "library": library,
        "files": [_identity(file) for file in files],
        "settings": probe_cache.settings_of(environ),
        "driver": facts.driver_version() or facts.driver_cuda(),
        "cupy": facts.cupy_version(),
    }


def _identity(file: str | None) -> list[object]:
    """Name, size and age: a library that was installed anew is another one."""
    if file is None:
        return []
    try:
        stat = Path(file).stat()
    except OSError:
        return [file]
    return [file, stat.st_size, stat.st_mtime_ns]


def cuda_awareness(
    library: str, path: str | None, environ: Mapping[str, str] = os.environ
) -> CudaAwareness:
    """What the MPI library says of itself, after MPI_Init. Nothing is sent.

    Args:
        library: Its name and version.
        path: Its file, as mapped into this process.
        environ: For the switches of Open MPI, Cray MPICH, MVAPICH and Intel MPI.
    """
    if facts.driver_version() is None and facts.driver_cuda() is None:
        return CudaAwareness("no", "no NVIDIA driver on this node")
    gtl = facts.mapped_file("libmpi_gtl_cuda") is not None
    return hint(Evidence(library, _load(path), environ, facts.ucx_facts(), gtl))


def _load(path: str | None) -> ctypes.CDLL | None:
    try:
        return None if path is None else ctypes.CDLL(path)
    except OSError:
        return None
