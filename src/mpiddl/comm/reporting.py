"""Gathers the facts about a job that its reports and recordings name."""

from __future__ import annotations

import os
import platform
import secrets
import socket
import time
from typing import TYPE_CHECKING

from mpiddl.base.settings import Settings
from mpiddl.comm.clocks import offsets_of_nodes
from mpiddl.comm.layout import Layout, exchange
from mpiddl.comm.messages import Messages
from mpiddl.comm.windows import Windows
from mpiddl.launch import library
from mpiddl.observe import flight_recorder
from mpiddl.observe.heartbeats import Heartbeats, process_name
from mpiddl.observe.job import Job

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["begin_reporting"]


def begin_reporting(
    comm: MPI.Comm, layout: Layout, messages: Messages, windows: Windows, settings: Settings
) -> None:
    """Have this rank's events kept, and its signs of life shown to the other ranks of its node.

    Collective over ``comm``. No message of ``messages``, which are between its ranks, may be in
    flight.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    clocks = exchange(comm, offsets_of_nodes(messages, layout, rank))
    offset, error = clocks[layout.nodes[layout.node_rank][0]]
    job = Job(
        name=exchange(comm, _new_name())[0],
        rank=rank,
        size=size,
        hosts=tuple(exchange(comm, socket.gethostname())),
        nodes=layout.nodes,
        node_rank=layout.node_rank,
        local_rank=layout.local_rank,
        clock=(offset, error),
        mpi=library.describe()["library"] or "",
        timeout=settings.timeout,
        trace=settings.trace,
    )
    flight_recorder.begin(job, _heartbeats(comm, layout, windows) if size > 1 else None)


def _heartbeats(comm: MPI.Comm, layout: Layout, windows: Windows) -> Heartbeats | None:
    window = windows.allocate(Heartbeats.NBYTES)
    names = exchange(comm, process_name())
    if window is None:
        return None
    processes = [names[rank] for rank in layout.nodes[layout.node_rank]]
    return Heartbeats(window.memory, window.part_bytes, layout.place, processes)


def _new_name() -> str:
    """When and where a job began, and something that no other job has."""
    host = platform.node().split(".")[0]
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{host}-{os.getpid()}-{secrets.token_hex(2)}"
