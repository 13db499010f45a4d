"""Facts about a rank, its node and its software, as plain JSON."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import psutil

import mpiddl
from mpiddl.api.objects import gather_json
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.comm.world import World
from mpiddl.devices.cuda_aware.facts import ucx_facts
from mpiddl.devices.cuda_aware.probe import staging_verdict
from mpiddl.devices.registry import device_at
from mpiddl.doctor.gpus import gpu_facts
from mpiddl.launch import library, threads

__all__ = ["VIRTUAL_INTERFACE", "environment_of", "first_interface", "rank_facts"]

VIRTUAL_INTERFACE = re.compile(r"docker|virbr|veth|br-|cni|flannel|podman")

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where MPI libraries put it


def rank_facts(world: World | None, test: bool = False) -> dict[str, Any]:
    """Facts of this rank.

    Args:
        world: This rank's world; None where MPI could not be started.
        test: Whether child processes may try if MPI reads GPU memory, where nothing else tells.
    """
    gpu = gpu_facts(world)
    return {
        "hostname": socket.gethostname(),
        "cpu": _cpu(),
        "cores": sorted(os.sched_getaffinity(0)),
        "node_cores": psutil.cpu_count(logical=True),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "threads_rule": threads.rule(),
        "start_method": multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_context().get_start_method(),
        "shared_memory_bytes": shutil.disk_usage(SHARED_MEMORY).free
        if SHARED_MEMORY.exists()
        else None,
        "interfaces": _interfaces(),
        "versions": _versions(),
        "gpu": gpu,
        "mpi": None if world is None else _mpi(world, test and gpu["device"] is not None),
        "place": None if world is None else _place(world),
    }


def environment_of(world: World) -> dict[str, Any]:
    """What a benchmark's numbers depend on. Collective; the same on every rank."""
    facts = rank_facts(world)
    kept = ("hostname", "cpu", "cores", "node_cores", "omp_num_threads", "versions", "place", "gpu")
    mine = {name: facts[name] for name in kept} | {"torch_threads": facts["gpu"]["torch_threads"]}
    ranks = gather_json(mine, world=world)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mpi": facts["mpi"]["library"],
        "mpi_defaults": facts["mpi"]["defaults"],
        "ucx": facts["mpi"]["ucx"],
        "cuda_aware": facts["mpi"]["cuda_aware"],
        "hosts": sorted({rank["hostname"] for rank in ranks}),
        "settings": dataclasses.asdict(world.settings),
        "ranks": ranks,
    }


def _cpu() -> str | None:
    """The processor's name, as Linux has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _place(world: World) -> dict[str, int]:
    return {
        "rank": world.rank,
        "size": world.size,
        "local_rank": world.local_rank,
        "local_size": world.local_size,
        "node_rank": world.node_rank,
        "num_nodes": world.num_nodes,
        "own_cores": world.layout.cores,
        "chunk_bytes": chunk_bytes_for(device_at(world.device), world),
    }


def _mpi(world: World, test: bool) -> dict[str, Any]:
    described = library.describe()
    awareness = staging_verdict(
        world.settings.staging,
        described["library"] or "",
        described["path"],
        world.device.index or 0,
        test=test and world.layout.place == 0,
    )
    return {
        **described,
        "cuda_aware": awareness.answer,
        "cuda_aware_reason": awareness.reason,
        "ucx": ucx_facts(),
        "ucx_tls": os.environ.get("UCX_TLS"),
        "ucx_memtype_cache": os.environ.get("UCX_MEMTYPE_CACHE"),
        "defaults": library.defaults(),
        "tcp_eager_bytes": os.environ.get(library.EAGER_LIMIT),
    }


def _versions() -> dict[str, str | None]:
    names = ("torch", "numpy", "mpi4py", "cupy-cuda12x", "cupy-cuda13x")
    versions: dict[str, str | None] = {
        "mpiddl": mpiddl.__version__,
        "python": platform.python_version(),
    }
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _interfaces() -> list[dict[str, Any]]:
    """Network interfaces that are up, without loopback."""
    stats, found = psutil.net_if_stats(), []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        ipv4 = [entry.address for entry in addresses if entry.family == socket.AF_INET]
        if name in stats and stats[name].isup and ipv4 and not ipv4[0].startswith("127."):
            found.append({"name": name, "address": ipv4[0], "mbit_per_second": stats[name].speed})
    return found


def first_interface() -> dict[str, Any] | None:
    """The network interface that other nodes probably reach this one by.

    GLOO_SOCKET_IFNAME names another.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    for interface in _interfaces():
        name = interface["name"]
        if name == named if named else not VIRTUAL_INTERFACE.match(name):
            return interface
    return None
