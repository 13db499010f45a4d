"""Which ranks share a node, and how many cores each has."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpiddl.observe.activity import waiting

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Layout", "cores_of", "exchange", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """Where a rank is in its node, and its node among all.

    Attributes:
        place: This rank among those of its node, in the order of ranks.
        local_rank: The same in the launcher's order: it may number ranks by core. A GPU is chosen
            by it before MPI starts.
        local_size: Ranks on this node.
        node_rank: This node among all, in the order of their lowest ranks.
        num_nodes: Number of nodes.
        cores: Cores that this rank can count as its own, at least 1.
        sharers: Ranks of the node that may run on some of the same cores, this one included.
        crowded: The ranks of this node outnumber the cores that they may run on.
        nodes: The ranks of every node, ascending.
        firsts: The rank of every node that has local rank 0.
    """

    place: int
    local_rank: int
    local_size: int
    node_rank: int
    num_nodes: int
    cores: int
    sharers: int
    crowded: bool
    nodes: tuple[tuple[int, ...], ...]
    firsts: tuple[int, ...]


def exchange(comm: MPI.Comm, value: Any) -> list[Any]:
    """Every rank's ``value`` (plain JSON), in rank order; for use while a world is made."""
    from mpi4py import MPI

    text = json.dumps(value).encode()
    lengths = bytearray(8 * comm.Get_size())
    with waiting():
        comm.Allgather([len(text).to_bytes(8, "little"), MPI.BYTE], [lengths, MPI.BYTE])
        counts = [
            int.from_bytes(lengths[at : at + 8], "little") for at in range(0, len(lengths), 8)
        ]
        texts = bytearray(sum(counts))
        comm.Allgatherv([text, MPI.BYTE], [texts, counts, MPI.BYTE])
    stops = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    return [
        json.loads(texts[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)
    ]


def find_layout(comm: MPI.Comm, node: MPI.Comm, announced: int | None) -> Layout:
    """Where everyone is. Collective over ``comm``.

    Args:
        comm: All ranks.
        node: Those that share memory with this one, in the order of their ranks in ``comm``.
        announced: This rank's local rank, as the launcher has it.
    """
    place = node.Get_rank()
    allowed = sorted(os.sched_getaffinity(0))
    affinities = exchange(node, allowed)
    cores = cores_of(exchange(node, _whole_cores(allowed)), place)
    local_ranks = exchange(node, announced)
    if set(local_ranks) != set(range(len(local_ranks))):  # a part of the job, or no launcher
        local_ranks = list(range(len(local_ranks)))
    ranks = exchange(node, comm.Get_rank())
    lowest_of = exchange(comm, ranks[0])
    first_of = exchange(comm, ranks[local_ranks.index(0)])
    members: dict[int, list[int]] = {}
    for rank, lowest in enumerate(lowest_of):
        members.setdefault(lowest, []).append(rank)
    return Layout(
        place=place,
        local_rank=local_ranks[place],
        local_size=node.Get_size(),
        node_rank=list(members).index(lowest_of[comm.Get_rank()]),
        num_nodes=len(members),
        cores=cores[0],
        sharers=cores[1],
        crowded=len(affinities) > len({core for cores in affinities for core in cores}),
        nodes=tuple(tuple(ranks) for ranks in members.values()),
        firsts=tuple(first_of[lowest] for lowest in members),
    )


def cores_of(affinities: list[list[int]], place: int) -> tuple[int, int]:
    """How many cores a rank of a node can count as its own, at least 1, and the ranks that share.

    Args:
        affinities: The cores each rank of the node may run on. A launcher that binds gives
            disjoint lists; without binding every rank may run everywhere, and they share.
        place: Which of them the rank is.
    """
    mine = set(affinities[place])
    sharers = sum(1 for other in affinities if mine & set(other))
    return max(1, len(mine) // sharers), sharers


def _whole_cores(allowed: list[int]) -> list[int]:
    """Each core of ``allowed`` by its first hardware thread: a second one computes little more."""
    firsts = set()
    for number in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            firsts.add(int(re.split("[-,]", siblings.read_text())[0]))
        except (OSError, ValueError):  # a system that does not tell
            firsts.add(number)
    return sorted(firsts)
