"""Whether this job's MPI reads GPU memory: found out once for each node, and said once."""

from __future__ import annotations

import fcntl
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpiddl.base.locks import lock
from mpiddl.base.log import logger
from mpiddl.comm.world import World
from mpiddl.devices.cuda_aware.cache import cache_file
from mpiddl.devices.cuda_aware.probe import staging_verdict
from mpiddl.launch import library

__all__ = ["mpi_reads_gpu_memory"]


def mpi_reads_gpu_memory(device: int) -> Callable[[World], bool]:
    """The question for GPU ``device``, to be asked once MPI runs; the answer is kept."""
    answers: list[bool] = []

    def ask(world: World) -> bool:
        if not answers:
            answers.append(_find_out(world, device))
        return answers[0]

    return ask


def _find_out(world: World, device: int) -> bool:
    mpi = library.describe()
    with _one_at_a_time():  # the first rank of a node may test; the others find what it found
        verdict = staging_verdict(world.settings.staging, mpi["library"] or "", mpi["path"], device)
    reads = verdict.answer == "yes"
    if not reads and world.rank == 0 and world.settings.staging == "auto":
        logger.warning(
            "%s is not given GPU memory (%s): messages go through pinned host memory, which is "
            "slower. `mpiddl doctor` and docs/gpu.md tell what to do",
            mpi["library"],
            verdict.reason,
        )
    return reads


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Among the processes of a node; all at once where no file can be made, or locked."""
    path = cache_file(platform.node()).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - closed below
    except OSError:
        yield
        return
    with file:
        lock(file.fileno(), fcntl.LOCK_EX)
        yield
