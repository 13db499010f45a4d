"""Facts about GPUs and the software for them, as plain JSON. Without a GPU they say so."""

from __future__ import annotations

import os
from typing import Any

from mpiddl.comm.world import World
from mpiddl.devices.cuda_aware import facts
from mpiddl.launch.launchers import gpu_binding

__all__ = ["describe_device", "gpu_facts"]

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the new name and the old one


def gpu_facts(world: World | None) -> dict[str, Any]:
    """What this rank sees of its node's GPUs.

    Args:
        world: For the GPU that this rank uses; None where MPI could not be started.
    """
    import torch

    driver, driver_cuda = facts.driver_version(), facts.driver_cuda()
    count = torch.cuda.device_count()
    # It takes a second to import, and no GPU needs it.
    cupy = facts.cupy_facts() if driver or driver_cuda else {}
    return {
        "driver": driver,
        "driver_cuda": driver_cuda,
        "torch_cuda": torch.version.cuda,
        "torch_nccl": _torch_nccl() if count else None,
        "cupy": facts.cupy_version(),
        "cupy_cuda": cupy.get("cuda"),
        "cupy_nccl": cupy.get("nccl"),
        "cupy_problem": cupy.get("problem"),
        "devices": [describe_device(index) for index in range(count)],
        "device": _device_of(world, count),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "binding": gpu_binding(),
        "allocator": next((os.environ[name] for name in _ALLOCATOR if name in os.environ), None),
        "torch_threads": torch.get_num_threads(),
    }


def describe_device(index: int) -> dict[str, Any]:
    """A visible GPU, by torch's number. Name and UUID tell it apart on its node."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)  # not in every torch
    place: list[Any] = [
        getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")
    ]
    return {
        "name": properties.name,
        "uuid": None if uuid is None else str(uuid),
        "pci": None if None in place else "{:04x}:{:02x}:{:02x}.0".format(*place),
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _device_of(world: World | None, count: int) -> int | None:
    """Torch's number of the GPU that this rank uses; None for the CPU."""
    if world is None or world.device.type != "cuda" or not count:
        return None
    return world.device.index or 0


def _torch_nccl() -> str | None:
    import torch

    nccl: Any = torch.cuda.nccl
    try:
        version = nccl.version()
    except (AttributeError, RuntimeError):  # a torch without it
        return None
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
