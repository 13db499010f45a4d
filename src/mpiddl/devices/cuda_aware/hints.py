"""What an MPI library says of itself: does it read GPU memory? Each family is asked in its own way.

Sources: Open MPI's MPIX_Query_cuda_support(3) and its code, MPICH's MPIX_GPU_query_support(3),
UCX's FAQ ("Working with GPU"), Intel's Developer Reference ("GPU Support"), MVAPICH's code, and the
pages of NERSC and CSCS on Cray MPICH.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

__all__ = ["CudaAwareness", "Evidence", "hint"]

_OFF = ("", "0", "false", "no", "off", "disable")
_ON = ("1", "true", "yes", "on", "enabled")


class CudaAwareness(NamedTuple):
    """Verdict and where it comes from. ``unknown``: hints disagree or say nothing."""

    answer: Literal["yes", "no", "unknown"]
    reason: str


class Evidence(NamedTuple):
    """What is known without sending anything.

    Attributes:
        library: The MPI library's name and version.
        handle: The library itself, for its queries; None if its file was not found.
        environ: This process's environment.
        ucx: As ``facts.ucx_facts`` has it.
        gtl: Whether Cray's libmpi_gtl_cuda is loaded.
    """

    library: str
    handle: object | None
    environ: Mapping[str, str]
    ucx: Mapping[str, Any] | None = None
    gtl: bool = False


def hint(evidence: Evidence) -> CudaAwareness:
    """The library's word, where it is known to mean what we need; else ``unknown``."""
    for family, judge in (
        ("Open MPI", _open_mpi),
        ("(?i)Cray", _cray),
        ("Intel", _intel),
        ("MVAPICH", _mvapich),
    ):
        if re.search(family, evidence.library):
            return judge(evidence)
    return _mpich(evidence)


def _open_mpi(evidence: Evidence) -> CudaAwareness:
    """Open MPI 5 answers for its own transports, Open MPI 4 for how it was built."""
    answer = _call(evidence.handle, "MPIX_Query_cuda_support")
    if answer is None:
        return CudaAwareness("unknown", f"{evidence.library} offers no query")
    if not answer:
        return CudaAwareness("unknown", "MPIX_Query_cuda_support() is 0; UCX may know better")
    if evidence.ucx is not None and not evidence.ucx["cuda"]:
        reason = "MPIX_Query_cuda_support() is 1, but UCX, which may carry messages, has no CUDA"
        return CudaAwareness("unknown", reason)
    switch = evidence.environ.get("OMPI_MCA_opal_cuda_support", "")
    if re.search(r"Open MPI v[1-4]\.", evidence.library) and switch.lower() not in _ON:
        reason = "built with CUDA; whether that is switched on (opal_cuda_support) is not known"
        return CudaAwareness("unknown", reason)
    return CudaAwareness("yes", "MPIX_Query_cuda_support() is 1")


def _cray(evidence: Evidence) -> CudaAwareness:
    """It needs a switch and a library of its own."""
    variable = "MPICH_GPU_SUPPORT_ENABLED"
    if _is_off(evidence, variable):
        return CudaAwareness("no", f"{_told(evidence, variable)}; 1 switches it on")
    if not evidence.gtl:
        return CudaAwareness("unknown", f"{variable} is set, but libmpi_gtl_cuda is not loaded")
    return CudaAwareness("yes", f"{variable} is set and libmpi_gtl_cuda is loaded")


def _intel(evidence: Evidence) -> CudaAwareness:
    if _is_off(evidence, "I_MPI_OFFLOAD"):
        return CudaAwareness("no", f"{_told(evidence, 'I_MPI_OFFLOAD')}; 1 switches it on")
    verdict = _mpich(evidence)
    if verdict.answer == "yes":
        return verdict
    return CudaAwareness("unknown", f"{_told(evidence, 'I_MPI_OFFLOAD')}; {verdict.reason}")


def _mvapich(evidence: Evidence) -> CudaAwareness:
    """MVAPICH2's query says how it was built; its switch counts, which is off by default."""
    second = "MVAPICH2" in evidence.library
    variable = "MV2_USE_CUDA" if second else "MVP_USE_CUDA"
    is_set = variable in evidence.environ
    if _is_off(evidence, variable) and (second or is_set):
        return CudaAwareness("no", f"{_told(evidence, variable)}; 1 switches it on")
    verdict = _mpich(evidence)
    if verdict.answer == "yes" and not is_set:
        return CudaAwareness("unknown", f"{verdict.reason}; {_told(evidence, variable)}")
    return verdict


def _mpich(evidence: Evidence) -> CudaAwareness:
    """MPICH 4 and 5, and those that descend from it. Its answer heeds MPIR_CVAR_ENABLE_GPU."""
    flag, cuda = ctypes.c_int(0), ctypes.c_int(0)  # MPIX_GPU_SUPPORT_CUDA is 0
    if _call(evidence.handle, "MPIX_GPU_query_support", cuda, ctypes.byref(flag)) == 0:
        answer: Literal["yes", "no"] = "yes" if flag.value else "no"
        return CudaAwareness(answer, f"MPIX_GPU_query_support() is {flag.value}")
    built = _call(evidence.handle, "MPIX_Query_cuda_support")
    if built is None:
        return CudaAwareness("unknown", f"{evidence.library} offers no query")
    return CudaAwareness("unknown" if built else "no", f"MPIX_Query_cuda_support() is {built}")


def _is_off(evidence: Evidence, variable: str) -> bool:
    return evidence.environ.get(variable, "").lower() in _OFF


def _told(evidence: Evidence, variable: str) -> str:
    text = evidence.environ.get(variable)
    return f"{variable} is not set" if text is None else f"{variable}={text}"


def _call(handle: object | None, name: str, *arguments: object) -> int | None:
    """A query's result; None where the library has no such function."""
    function = getattr(handle, name, None)
    return None if function is None else int(function(*arguments))
