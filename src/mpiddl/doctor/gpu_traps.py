"""Known traps of GPUs and of the software for them. Each says what to do.

Sources: UCX's FAQ ("Working with GPU") and the notes of its release 1.12.1, openmpi/ompi #11949 and
#10871, openucx/ucx #11548 (torch's allocators), NVIDIA's CUDA compatibility guide, practice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from mpiddl.doctor.findings import Facts, Trap, by_node

__all__ = ["GPU_FINDERS"]

_WITHOUT_IPC = re.compile(r"(?i)expandable_segments:\s*true|backend:\s*cudaMallocAsync")
_OLD_UCX = (1, 12, 1)
_OFF = ("n", "no", "0", "false", "off")


def _torch_without_gpus(facts: Facts) -> Iterator[Trap]:
    for hostname, ranks in by_node(facts).items():
        gpu = ranks[0]["gpu"]
        if gpu["driver"] is None or gpu["devices"]:
            continue
        if gpu["torch_cuda"] is None:
            newest = f" for CUDA {gpu['driver_cuda']} or older" if gpu["driver_cuda"] else ""
            yield Trap(
                "warning",
                f"{hostname} has an NVIDIA driver, but this torch is built for the CPU",
                f"install the torch build{newest} from the index that PyTorch's install page names",
            )
        else:
            hidden = gpu["visible"] is not None
            yield Trap(
                "warning",
                f"{hostname} has an NVIDIA driver, but torch sees no GPU"
                + (f" (CUDA_VISIBLE_DEVICES={gpu['visible']})" if hidden else ""),
                "ask for GPUs (Slurm: --gpus-per-node=N), or unset CUDA_VISIBLE_DEVICES",
            )


def _old_driver(facts: Facts) -> Iterator[Trap]:
    for hostname, ranks in by_node(facts).items():
        gpu = ranks[0]["gpu"]
        if not (gpu["driver_cuda"] and gpu["torch_cuda"]):
            continue
        newest, built = _numbers(gpu["driver_cuda"]), _numbers(gpu["torch_cuda"])
        if newest[:1] < built[:1]:
            yield Trap(
                "error",
                f"the driver of {hostname} knows CUDA up to {gpu['driver_cuda']}, this torch is "
                f"built for {gpu['torch_cuda']}",
                f"install a torch and a CuPy for CUDA {newest[0]}, or a newer driver",
            )
        elif newest[:2] < built[:2]:
            yield Trap(
                "note",
                f"torch is built for CUDA {gpu['torch_cuda']}, the driver of {hostname} knows up "
                f"to {gpu['driver_cuda']}: it works, but for kernels that come as PTX",
                "a newer driver, or a torch for that CUDA, if a kernel is refused",
            )


def _no_cupy(facts: Facts) -> Iterator[Trap]:
    gpu = facts[0]["gpu"]
    if not (gpu["devices"] and gpu["torch_cuda"]):
        return
    extra = f"cuda{_numbers(gpu['torch_cuda'])[0]}"
    if gpu["cupy"] is None:
        yield Trap(
            "error",
            "CuPy, with which mpiddl works on GPU memory, is not installed",
            f"pip install 'mpiddl[{extra}]'",
        )
    elif gpu["cupy_problem"]:
        yield Trap(
            "error",
            f"CuPy cannot be used: {gpu['cupy_problem']}",
            f"pip install --force-reinstall 'mpiddl[{extra}]'",
        )
    elif gpu["cupy_cuda"] and _numbers(gpu["cupy_cuda"])[0] != _numbers(gpu["torch_cuda"])[0]:
        yield Trap(
            "warning",
            f"CuPy is built for CUDA {gpu['cupy_cuda']}, torch for {gpu['torch_cuda']}",
            f"pip uninstall {gpu['cupy'].split()[0]}; pip install 'mpiddl[{extra}]'",
        )


def _lost_ipc(facts: Facts) -> Iterator[Trap]:
    gpu = facts[0]["gpu"]
    if gpu["devices"] and gpu["allocator"] and (found := _WITHOUT_IPC.search(gpu["allocator"])):
        yield Trap(
            "warning",
            f"PYTORCH_ALLOC_CONF has {found.group()}: other processes cannot map memory that torch "
            "allocates so (CUDA IPC), and an MPI may send it through the host",
            "unset it. Gradients that mpiddl exchanges are not concerned: it allocates them itself",
        )


def _different_gpus(facts: Facts) -> Iterator[Trap]:
    for hostname, ranks in by_node(facts).items():
        if len({_visible(rank["gpu"]) for rank in ranks}) < 2:
            continue
        binding = next((rank["gpu"]["binding"] for rank in ranks if rank["gpu"]["binding"]), None)
        ask = "Slurm: --gpus-per-node=N --gpu-bind=none"
        yield Trap(
            "warning",
            f"the ranks on {hostname} see different GPUs: an MPI may fail to map memory of a GPU "
            "that it cannot see (CUDA IPC), or take the way through the host",
            f"{ask} instead of {binding}"
            if binding
            else f"let every rank see all GPUs of its node ({ask}); each takes that of its local "
            "rank. Set CUDA_VISIBLE_DEVICES the same for all ranks, or not at all",
        )


def _shared_gpus(facts: Facts) -> Iterator[Trap]:
    for hostname, ranks in by_node(facts).items():
        used = Counter(own for rank in ranks if (own := _own(rank["gpu"])) is not None)
        most = max(used.values(), default=0)
        if most < 2:
            continue
        count = len({device for rank in ranks for device in _visible(rank["gpu"])[1]})
        if count < len(ranks):
            what = f"{len(ranks)} ranks on {hostname} share {count} GPU(s)"
            fix = f"start {count} rank(s) per node, or ask for {len(ranks)} GPUs per node"
        else:
            what = f"{most} ranks on {hostname} use one GPU, although {count} are visible"
            fix = "leave device= out of mpiddl.init(), so that each rank takes that of its number"
        yield Trap(
            "note",
            f"{what}: their kernels take turns, and NCCL refuses",
            f"{fix}. Where it is wanted: CUDA's MPS lets kernels of several ranks run at once",
        )


def _ucx_transports(facts: Facts) -> Iterator[Trap]:
    gpu, mpi = facts[0]["gpu"], facts[0]["mpi"]
    if not gpu["devices"] or mpi is None or mpi["ucx"] is None or not mpi["ucx_tls"]:
        return
    told = mpi["ucx_tls"]
    names = set(told.removeprefix("^").split(","))
    has = {
        name: (name in names or not names.isdisjoint({"cuda", "all"})) != told.startswith("^")
        for name in ("cuda_copy", "cuda_ipc")
    }
    fix = "unset UCX_TLS" if told.startswith("^") else f"export UCX_TLS={told},cuda, or unset it"
    if not has["cuda_copy"]:
        what = f"UCX_TLS={told} has no cuda_copy: UCX takes GPU memory for host memory, and crashes"
        yield Trap("warning", what, fix)
    elif not has["cuda_ipc"]:
        what = f"UCX_TLS={told} has no cuda_ipc: within a node GPU memory goes through the host"
        yield Trap("note", what, fix)


def _memory_types(facts: Facts) -> Iterator[Trap]:
    """UCX remembers which addresses are GPU memory, by hooks on CUDA's calls."""
    gpu, mpi = facts[0]["gpu"], facts[0]["mpi"]
    if not gpu["devices"] or mpi is None or mpi["ucx"] is None:
        return
    told, version = (mpi["ucx_memtype_cache"] or "").lower(), mpi["ucx"]["version"]
    if told in _OFF:
        return
    if (0,) < _numbers(version) < _OLD_UCX:
        yield Trap(
            "warning",
            f"UCX {version} may miss GPU memory that CuPy allocates (its CUDA runtime is linked "
            "statically), take it for host memory, and crash",
            "export UCX_MEMTYPE_CACHE=n, or use UCX 1.12.1 or newer",
        )
    elif told in ("y", "yes", "1", "true", "on"):
        yield Trap(
            "note",
            f"UCX_MEMTYPE_CACHE={told} keeps UCX from giving its cache of memory types up where it "
            "cannot be trusted",
            "unset it; UCX_MEMTYPE_CACHE=n, if UCX takes GPU memory for host memory",
        )


def _not_cuda_aware(facts: Facts) -> Iterator[Trap]:
    gpu, mpi = facts[0]["gpu"], facts[0]["mpi"]
    if not gpu["devices"] or mpi is None or mpi["cuda_aware"] == "yes":
        return
    known = "cannot read" if mpi["cuda_aware"] == "no" else "is not known to read"
    yield Trap(
        "note",
        f"{mpi['library']} {known} GPU memory, so that it goes through host memory: "
        f"{mpi['cuda_aware_reason']}",
        "docs/gpu.md says how to get an MPI that does, for each kind of cluster",
    )


def _visible(gpu: dict[str, Any]) -> tuple[str | None, frozenset[str]]:
    """The GPUs that a rank sees: by UUID, where torch knows them, else by what it was told."""
    uuids = [device["uuid"] for device in gpu["devices"]]
    if None not in uuids:
        return None, frozenset(uuids)
    return gpu["visible"], frozenset(str(index) for index in range(len(uuids)))


def _own(gpu: dict[str, Any]) -> str | None:
    """What names the GPU that a rank uses."""
    if gpu["device"] is None:
        return None
    return gpu["devices"][gpu["device"]]["uuid"] or f"{gpu['visible']} {gpu['device']}"


def _numbers(version: str) -> tuple[int, ...]:
    """ "13.0" -> (13, 0)."""
    return tuple(map(int, re.findall(r"\d+", version))) or (0,)


GPU_FINDERS: tuple[Callable[[Facts], Iterator[Trap]], ...] = (
    _torch_without_gpus,
    _old_driver,
    _no_cupy,
    _lost_ipc,
    _different_gpus,
    _shared_gpus,
    _ucx_transports,
    _memory_types,
    _not_cuda_aware,
)
