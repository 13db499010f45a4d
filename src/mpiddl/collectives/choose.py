"""Which algorithm runs an all-reduce: what the user forces, else the built-in rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mpiddl.base.settings import ALGORITHM_NAMES
from mpiddl.base.waits import Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.direct import direct_all_reduce
from mpiddl.collectives.doubling import doubling_all_reduce
from mpiddl.collectives.library import library_all_reduce
from mpiddl.collectives.nccl import NCCL_DTYPES, nccl_all_reduce, nccl_problem
from mpiddl.collectives.node.hierarchical import hierarchical_all_reduce
from mpiddl.collectives.node.shared import shared_all_reduce
from mpiddl.collectives.reduction import DTYPES, Reduction
from mpiddl.collectives.reference import reference_all_reduce
from mpiddl.collectives.ring import ring_all_reduce
from mpiddl.comm.native import NATIVE_DTYPES
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.host import HOST
from mpiddl.errors import UnsupportedBufferError

__all__ = [
    "ALGORITHMS",
    "CHUNK_BYTES",
    "Algorithm",
    "AllReduce",
    "Chosen",
    "choose",
    "chunk_bytes_for",
]

FEW_BYTES = 32 << 10
"""Up to here the number of messages counts, not their size."""


class AllReduce(Protocol):
    """The signature that all algorithms share."""

    def __call__(
        self,
        buffer: Buffer,
        reduction: Reduction,
        channel: Channel,
        device: Device,
        chunk_bytes: int,
    ) -> Waits[None]: ...


@dataclass(frozen=True)
class Algorithm:
    """One way to run an all-reduce.

    Attributes:
        run: Makes the generator. Those of a library take their turn then.
        dtypes: What it can reduce.
        ordered: Every rank must start these collectives in the same order (a library runs
            them); the others may be started in any order.
        one_node: All ranks must be on one node.
        lanes: It goes through shared memory.
        reach: Ranks of a node must be able to read each other's memory.
        gpu: It works on GPUs only, through NCCL.
    """

    run: AllReduce
    dtypes: frozenset[torch.dtype] = frozenset(DTYPES)
    ordered: bool = False
    one_node: bool = False
    lanes: bool = False
    reach: bool = False
    gpu: bool = False


ALGORITHMS = {
    "shared": Algorithm(shared_all_reduce, one_node=True, lanes=True),
    "hierarchical": Algorithm(hierarchical_all_reduce, lanes=True, reach=True),
    "ring": Algorithm(ring_all_reduce),
    "direct": Algorithm(direct_all_reduce),
    "doubling": Algorithm(doubling_all_reduce),
    "library": Algorithm(
        library_all_reduce,
        dtypes=frozenset(getattr(torch, name) for name in NATIVE_DTYPES),
        ordered=True,
    ),
    "nccl": Algorithm(
        nccl_all_reduce,
        dtypes=frozenset(getattr(torch, name) for name in NCCL_DTYPES),
        ordered=True,
        gpu=True,
    ),
    "reference": Algorithm(reference_all_reduce),
}


@dataclass(frozen=True)
class Chosen:
    """An algorithm and the chunks that it works in."""

    algorithm: Algorithm
    chunk_bytes: int

    def run(
        self, buffer: Buffer, reduction: Reduction, channel: Channel, device: Device
    ) -> Waits[None]:
        """The collective."""
        return self.algorithm.run(buffer, reduction, channel, device, self.chunk_bytes)


CHUNK_BYTES, GPU_CHUNK_BYTES = 512 << 10, 4 << 20
"""Where the user chose no other. A chunk costs the host some 20 us, and a GPU's memory is fast."""


def chunk_bytes_for(device: Device, world: World) -> int:
    """The unit of pipelining on ``device``."""
    chosen = world.settings.chunk_size
    if chosen is not None:
        return chosen
    return GPU_CHUNK_BYTES if device.late else CHUNK_BYTES


def choose(
    name: str,
    dtype: torch.dtype,
    nbytes: int,
    world: World,
    lanes: bool = True,
    device: Device = HOST,
    mapped: bool = False,
) -> Chosen:
    """The algorithm called ``name``, or for ``"auto"`` the best for ``nbytes`` on these ranks.

    ``auto`` goes by what ``mpiddl tune`` measured on ranks like these, else by rules.

    Args:
        name: What the user chose.
        dtype: Of the buffer.
        nbytes: Of the buffer.
        world: The ranks.
        lanes: Whether there are lanes for it; without shared memory there are none.
        device: That the buffer is on.
        mapped: All buffers are in windows of that device, on every rank.

    Raises:
        ValueError: No algorithm has that name.
        UnsupportedBufferError: It cannot reduce ``dtype``, or not over these ranks.
    """
    if name not in ALGORITHM_NAMES:
        raise ValueError(f"unknown algorithm {name!r}; valid are {', '.join(ALGORITHM_NAMES)}")
    chunk_bytes = chunk_bytes_for(device, world)
    near = mapped if device.late else world.reach is not None
    lanes = (lanes and world.lane_window is not None) or world.size == 1
    if name == "auto":
        name, chunk_bytes = _tuned(dtype, nbytes, world, lanes, near, device) or (
            _rule(nbytes, world, lanes, near),
            chunk_bytes,
        )
    problem = _problem(name, dtype, world, lanes, near, device)
    if problem is not None:
        raise UnsupportedBufferError(problem)
    return Chosen(ALGORITHMS[name], chunk_bytes)


def _problem(
    name: str, dtype: torch.dtype, world: World, lanes: bool, near: bool, device: Device
) -> str | None:
    """Why an algorithm cannot reduce ``dtype`` over these ranks."""
    algorithm = ALGORITHMS[name]
    if algorithm.gpu and (problem := nccl_problem(device, world)) is not None:
        return problem
    if algorithm.one_node and world.num_nodes > 1:
        return f"algorithm {name!r} works within one node, and these ranks are on {world.num_nodes}"
    if algorithm.lanes and not lanes:
        return f"algorithm {name!r} needs shared memory, and a node has too little of it left"
    if algorithm.reach and not near and world.size > 1:
        if device.late:
            return (
                f"algorithm {name!r} works on GPU memory that the ranks of a node have mapped: "
                "that of mpiddl.empty(..., device=...), or of gradients, where CUDA IPC works"
            )
        return (
            f"algorithm {name!r} copies between the ranks of a node with process_vm_readv, which "
            "the system forbids here (or MPIDDL_SINGLE_COPY=0)"
        )
    if dtype not in algorithm.dtypes:
        listed = ", ".join(sorted(str(known) for known in algorithm.dtypes))
        return f"algorithm {name!r} cannot reduce {dtype}, only {listed}"
    return None


def _tuned(
    dtype: torch.dtype, nbytes: int, world: World, lanes: bool, near: bool, device: Device
) -> tuple[str, int] | None:
    """What was measured to be fastest, if it can be used for this."""
    if device.late != world.on_gpu:
        return None
    for choice in world.tuned:
        if choice.up_to is None or nbytes <= choice.up_to:
            usable = _problem(choice.algorithm, dtype, world, lanes, near, device) is None
            return (choice.algorithm, choice.chunk_bytes) if usable else None
    return None


def _rule(nbytes: int, world: World, lanes: bool, near: bool) -> str:
    """What is fastest where nothing was measured; the same on every rank."""
    if world.num_nodes == 1 and lanes:
        return "shared"
    if nbytes <= FEW_BYTES:
        return "doubling"
    shares_nodes = world.num_nodes < world.size
    return "hierarchical" if shares_nodes and lanes and near else "ring"
