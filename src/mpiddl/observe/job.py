"""Facts about the job, which reports and recordings name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What ``mpiddl.init()`` tells this package about the ranks; plain values.

    Attributes:
        name: A name that no other job has; the same on every rank.
        rank: This process among all ranks.
        size: Number of ranks.
        hosts: The host name of every rank.
        nodes: The ranks of every node, ascending.
        node_rank: This node among ``nodes``.
        local_rank: This process among the ranks of its node.
        clock: What to add to this node's CLOCK_MONOTONIC for rank 0's, and the error of that sum,
            both in nanoseconds.
        mpi: Name and version of the MPI library.
        timeout: Seconds after which a rank that waits in vain ends the job; 0: never.
        trace: The folder into which this job is traced from the start; empty: none.
    """

    name: str
    rank: int
    size: int
    hosts: tuple[str, ...]
    nodes: tuple[tuple[int, ...], ...]
    node_rank: int
    local_rank: int
    clock: tuple[int, int]
    mpi: str
    timeout: float
    trace: str

    @property
    def host(self) -> str:
        """The name of this rank's host."""
        return self.hosts[self.rank]

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks of this node, this one included."""
        return self.nodes[self.node_rank]
