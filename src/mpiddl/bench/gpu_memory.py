"""How fast this node's GPUs copy memory: within each, from GPU to GPU, to the host and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mpiddl.api.barrier import barrier
from mpiddl.api.objects import gather_json
from mpiddl.base.waits import AllOf, Wait
from mpiddl.bench.memory import busbw_limit
from mpiddl.bench.timing import wait_for
from mpiddl.comm.world import World
from mpiddl.devices.cuda.device import CudaDevice
from mpiddl.devices.cuda.streams import Events
from mpiddl.devices.registry import device_at
from mpiddl.devices.staging import Stage

__all__ = ["gpu_busbw_limit", "measure_gpu_memory", "peer_bandwidth"]

COPY_BYTES = 256 << 20
"""More than a GPU's caches hold."""
LINK_BYTES = 64 << 20
COPIES = 8
"""One after the other: what it takes to ask for them is not to count."""
ROUNDS = 10


def measure_gpu_memory(
    world: World, copy_bytes: int = COPY_BYTES, link_bytes: int = LINK_BYTES
) -> dict[str, Any]:
    """Bandwidths of rank 0's node, all its ranks at a time, in 1e9 bytes/s. Collective.

    Args:
        world: The ranks, each with a GPU.
        copy_bytes: Of a buffer that is copied within a GPU.
        link_bytes: Of one that is copied between two, or to the host.

    Returns:
        ``copy_gbps``: within GPUs, ``copy_`` by all ranks together, bytes read and written.
        ``peer_gbps``: into each rank's memory from that of the next one, by CUDA IPC; None where
        ranks cannot map each other's.
        ``pcie_gbps``: each rank's from its GPU to pinned memory, while it copies as much back.
        The last two are the slowest rank's, of one direction while both are in use.
    """
    return {
        "copy_gbps": _copy_gbps(world, copy_bytes),
        "peer_gbps": _slowest_neighbour(peer_bandwidth(world, link_bytes)),
        "pcie_gbps": _pcie_gbps(world, link_bytes),
    }


def gpu_busbw_limit(memory: dict[str, Any], ranks: int, sharers: int) -> float:
    """GB/s of an all-reduce on one node if memory and links alone held it up.

    Memory: as on the host, each rank's buffer is read and written once, whoever does it. Links, if
    every rank has a GPU to itself: a rank reads n-1 segments from other GPUs and writes as many,
    while its own are read and written by others. So 2(n-1)/n of the buffer passes its link each
    way, which is what busbw counts.

    Args:
        memory: From ``measure_gpu_memory``.
        ranks: All on one node.
        sharers: The most of them that use one GPU.
    """
    limit = busbw_limit(memory["copy_gbps"], ranks)
    own_gpus = sharers == 1 and memory["peer_gbps"] is not None
    return min(limit, memory["peer_gbps"]) if own_gpus else limit


def peer_bandwidth(
    world: World, nbytes: int = LINK_BYTES, rounds: int = ROUNDS
) -> list[dict[str, Any]] | None:
    """Copies between the GPUs of the ranks of each node. Collective; the same on every rank.

    All ranks copy at a time, each from one other: first from the next one, then from the one after
    that, ...; so each link is used both ways.

    Returns:
        A dictionary for each rank, in rank order: ``hostname``, ``node_rank``, ``local_rank``, and
        ``from_gbps``, in 1e9 bytes/s from each rank of the node, None from itself. None instead of
        all that if ranks cannot map each other's memory, or share no node.
    """
    device = device_at(world.device)
    source, target = (device.empty(nbytes, torch.uint8, world) for _ in range(2))
    number, offset = device.mapped(world).find(source.data_ptr())
    most = max(gather_json(world.local_size, world=world))
    if not number or most == 1:
        return None
    size = world.local_size
    views = device.mapped(world).views(number, [offset] * size, nbytes, torch.uint8)
    rates: list[float | None] = [None] * size
    for distance in range(1, most):
        peer = (world.layout.place + distance) % size

        def copy(peer: int = peer, takes_part: bool = distance < size) -> Wait:
            for _ in range(COPIES if takes_part else 0):
                device.copy(target, views[peer])
            return device.fence()

        seconds = min(_rounds(world, copy, rounds))
        if distance < size:
            rates[peer] = COPIES * nbytes / seconds / 1e9
    place = {"hostname": world.hostname, "node_rank": world.node_rank}
    mine = {**place, "local_rank": world.local_rank, "from_gbps": rates}
    found: list[dict[str, Any]] = gather_json(mine, world=world)
    return found


def _slowest_neighbour(ranks: list[dict[str, Any]] | None) -> float | None:
    """Of the ranks of node 0, each copying from the next."""
    node = [rank["from_gbps"] for rank in ranks or () if rank["node_rank"] == 0]
    if len(node) < 2:
        return None
    neighbours: list[float] = [rates[(p + 1) % len(node)] for p, rates in enumerate(node)]
    return min(neighbours)


def _copy_gbps(world: World, nbytes: int) -> float:
    device = device_at(world.device)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=world.device) for _ in range(2))

    def copy() -> Wait:
        for _ in range(COPIES):
            target.copy_(source)
        return device.settled()

    everyones = gather_json([world.node_rank, _rounds(world, copy)], world=world)
    node = [seconds for node_rank, seconds in everyones if node_rank == 0]
    slowest: float = min(map(max, zip(*node, strict=True)))
    return 2 * COPIES * nbytes * len(node) / slowest / 1e9


def _pcie_gbps(world: World, nbytes: int) -> float:
    device = device_at(world.device)
    assert isinstance(device, CudaDevice)
    stage = Stage(device.runtime, Events(device.runtime))
    leaving, arriving = stage.take(nbytes), stage.take(nbytes)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=world.device) for _ in range(2))

    def copy() -> Wait:
        for _ in range(COPIES):
            out = stage.copy_out(leaving, source.data_ptr(), nbytes)
            back = stage.copy_in(target.data_ptr(), arriving, nbytes)
        return AllOf([out, back])

    everyones = gather_json([world.node_rank, min(_rounds(world, copy))], world=world)
    slowest: float = max(seconds for node_rank, seconds in everyones if node_rank == 0)
    return COPIES * nbytes / slowest / 1e9


def _rounds(world: World, copy: Callable[[], Wait], rounds: int = ROUNDS) -> list[float]:
    """This rank's seconds for each round that all begin together; the first one does not count."""
    device, seconds = device_at(world.device), []
    for _ in range(rounds + 1):
        wait_for(device.settled())
        barrier(world=world)
        started = time.perf_counter()
        wait_for(copy())
        seconds.append(time.perf_counter() - started)
    return seconds[1:]
