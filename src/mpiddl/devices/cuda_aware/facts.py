"""What this process can see of NVIDIA's driver, of CuPy and of UCX, without touching a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

__all__ = [
    "cupy_facts",
    "cupy_version",
    "driver_cuda",
    "driver_version",
    "mapped_file",
    "ucx_facts",
]

CUPY_WHEELS = ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")

_DRIVER = Path("/proc/driver/nvidia/version")
_MAPS = Path("/proc/self/maps")


def driver_version() -> str | None:
    """Of the kernel's NVIDIA driver: ``"580.159.04"``; None where there is none to be seen."""
    try:
        text = _DRIVER.read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", text)
    return match.group(1) if match else text.splitlines()[0] if text else "unknown"


def driver_cuda() -> str | None:
    """The newest CUDA that the driver's library knows: ``"13.0"``; None without that library."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int(0)
        status = library.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return _cuda_version(number.value) if status == 0 and number.value else None


def cupy_version() -> str | None:
    """Of the CuPy that is installed, with its wheel's name; None without. Nothing is imported."""
    for name in CUPY_WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return None


def cupy_facts() -> dict[str, str | None]:
    """CuPy's own version, its CUDA runtime and its NCCL. None where CuPy cannot be imported."""
    facts: dict[str, str | None] = {"version": None, "cuda": None, "nccl": None, "problem": None}
    if importlib.util.find_spec("cupy") is None:
        return facts
    try:
        import cupy

        facts["version"] = cupy.__version__
        facts["cuda"] = _cuda_version(cupy.cuda.runtime.runtimeGetVersion())
    except Exception as error:  # a CuPy that cannot load its CUDA raises what it likes
        facts["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return facts
    with warnings.catch_warnings(), contextlib.suppress(ImportError, AttributeError):
        warnings.simplefilter("ignore")  # without NCCL CuPy says how to install it
        from cupy.cuda import nccl

        facts["nccl"] = _nccl_version(nccl.get_version())
    return facts


def ucx_facts() -> dict[str, Any] | None:
    """UCX in this process: its version, file, and whether its CUDA transports are loaded."""
    path = mapped_file("libucp")
    if path is None:
        return None
    try:
        library = ctypes.CDLL(path)
        library.ucp_get_version_string.restype = ctypes.c_char_p
        version = library.ucp_get_version_string().decode()
    except (OSError, AttributeError):
        version = Path(path).resolve().name
    return {"version": version, "path": path, "cuda": mapped_file("libuct_cuda") is not None}


def mapped_file(stem: str) -> str | None:
    """File of a library in this process, by the beginning of its name; None if it is not there."""
    if not _MAPS.exists():
        return None
    pattern = rf"\s(/\S*/{stem}(?:-\w+)?\.so[\d.]*)$"
    match = re.search(pattern, _MAPS.read_text(), re.MULTILINE)
    return match.group(1) if match else None


def _cuda_version(number: int) -> str:
    """12040 -> "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _nccl_version(number: int) -> str:
    """22703 -> "2.27.3"; before 2.9 there was a digit less."""
    major = 10000 if number >= 10000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"
