"""Can this MPI read GPU memory? Hints that cost nothing; nothing is sent here."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["CudaAwareness", "cuda_awareness"]


class CudaAwareness(NamedTuple):
    """Verdict and where it comes from. ``unknown``: hints disagree or say nothing."""

    answer: Literal["yes", "no", "unknown"]
    reason: str


_SWITCHES = (  # variable that switches GPU support on, in libraries that are told so
    ("CRAY MPICH", "MPICH_GPU_SUPPORT_ENABLED"),
    ("MVAPICH", "MVP_USE_CUDA"),
    ("MVAPICH2", "MV2_USE_CUDA"),
    ("Intel", "I_MPI_OFFLOAD"),
)


def cuda_awareness(
    library: str, path: str | None, environ: Mapping[str, str] = os.environ
) -> CudaAwareness:
    """What the MPI library says of itself, after MPI_Init.

    Args:
        library: Its name and version.
        path: Its file, as mapped into this process.
        environ: For the switches of Cray MPICH, MVAPICH and Intel MPI.
    """
    if not Path("/proc/driver/nvidia/version").exists():
        return CudaAwareness("no", "no NVIDIA driver on this node")
    for family, variable in _SWITCHES:
        if family in library and variable in environ:
            on = environ[variable] not in ("", "0")
            return CudaAwareness("yes" if on else "no", f"{variable}={environ[variable]}")
    if path is None:
        return CudaAwareness("unknown", "the MPI library's file was not found")
    return _ask(ctypes.CDLL(path), library)


def _ask(handle: ctypes.CDLL, library: str) -> CudaAwareness:
    """The two queries that libraries offer."""
    if "Open MPI" in library and hasattr(handle, "MPIX_Query_cuda_support"):
        if handle.MPIX_Query_cuda_support():
            return CudaAwareness("yes", "MPIX_Query_cuda_support() is 1")
        # Also 0 where only UCX underneath was built with CUDA.
        return CudaAwareness("unknown", "MPIX_Query_cuda_support() is 0; UCX may know better")
    if hasattr(handle, "MPIX_GPU_query_support"):
        flag = ctypes.c_int(0)
        handle.MPIX_GPU_query_support(0, ctypes.byref(flag))  # 0 is MPIX_GPU_SUPPORT_CUDA
        return CudaAwareness("yes" if flag.value else "no", "MPIX_GPU_query_support()")
    return CudaAwareness("unknown", f"{library} offers no query")
