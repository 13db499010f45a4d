"""Gathers the facts about a job that its reports and recordings name."""

from __future__ import annotations

import os
import platform
import secrets
import time
from typing import TYPE_CHECKING

from mpiddl.comm.clocks import offsets_of_nodes
from mpiddl.comm.layout import exchange
from mpiddl.launch import library
from mpiddl.observe import flight_recorder
from mpiddl.observe.heartbeats import Heartbeats, process_name
from mpiddl.observe.job import Job

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpiddl.comm.world import World

__all__ = ["begin_reporting"]


def begin_reporting(world: World, comm: MPI.Comm) -> None:
    """Have this rank's events kept, and its signs of life shown to the other ranks of its node.

    Collective.

    Args:
        world: The world of ``mpiddl.init()``. None of its messages may be in flight.
        comm: The communicator of that world.
    """
    nodes, node_rank = world.layout.nodes, world.node_rank
    clocks = exchange(comm, offsets_of_nodes(world.messages, world.layout, world.rank))
    offset, error = clocks[nodes[node_rank][0]]
    job = Job(
        name=exchange(comm, _new_name())[0],
        rank=world.rank,
        size=world.size,
        hosts=tuple(exchange(comm, world.hostname)),
        nodes=nodes,
        node_rank=node_rank,
        local_rank=world.local_rank,
        clock=(offset, error),
        mpi=library.describe()["library"] or "",
        timeout=world.settings.timeout,
        trace=world.settings.trace,
    )
    flight_recorder.begin(job, _heartbeats(world, comm) if world.size > 1 else None)


def _heartbeats(world: World, comm: MPI.Comm) -> Heartbeats | None:
    window = world.windows.allocate(Heartbeats.NBYTES)
    names = exchange(comm, process_name())
    processes = [names[rank] for rank in world.layout.nodes[world.node_rank]]
    if window is None:
        return None
    return Heartbeats(window.memory, window.part_bytes, world.layout.place, processes)


def _new_name() -> str:
    """When and where a job began, and something that no other job has."""
    host = platform.node().split(".")[0]
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{host}-{os.getpid()}-{secrets.token_hex(2)}"
