"""Which device a tensor is on."""

from __future__ import annotations

import torch

from mpiddl.devices.base import Device
from mpiddl.devices.host import HOST
from mpiddl.errors import UnsupportedBufferError

__all__ = ["device_at", "device_of", "register"]

_devices: dict[torch.device, Device] = {torch.device("cpu"): HOST}


def device_of(tensor: torch.Tensor) -> Device:
    """What works on this tensor's memory.

    Raises:
        UnsupportedBufferError: Neither in host memory nor on an NVIDIA GPU, or CuPy is missing.
    """
    return device_at(tensor.device)


def device_at(place: torch.device) -> Device:
    """The same for tensors on ``place``."""
    try:
        return _devices[place]
    except KeyError:
        pass
    if str(place) == "cuda":
        return device_at(torch.device("cuda", torch.cuda.current_device()))
    return register(place, _make(place))


def register(place: torch.device, device: Device) -> Device:
    """Let ``device`` work on tensors on ``place``; returns it."""
    _devices[place] = device
    return device


def _make(place: torch.device) -> Device:
    if place.type != "cuda":
        raise UnsupportedBufferError(
            f"a tensor on {place}; host memory and NVIDIA GPUs are supported. Pass tensor.cpu() "
            "and copy the result back"
        )
    try:
        import cupy

        problem = "" if int(cupy.__version__.split(".")[0]) >= 14 else f"{cupy.__version__} is here"
    except ImportError as error:
        problem = f"it cannot be imported: {error}"
    if problem:
        raise UnsupportedBufferError(
            f"a tensor on {place}, for which CuPy 14 or newer is needed ({problem}); pip install "
            "'mpiddl[cuda13]', or [cuda12] for a torch of CUDA 12"
        )
    from mpiddl.devices.cuda.device import CudaDevice
    from mpiddl.devices.cuda.driver import CudaRuntime
    from mpiddl.devices.cuda_aware.verdict import mpi_reads_gpu_memory

    return CudaDevice(CudaRuntime(place.index), mpi_reads_gpu_memory(place.index))
