"""How many threads torch has in a rank."""

from __future__ import annotations

import os

__all__ = ["rule", "share_cores"]

CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_rule = "torch's own"


def share_cores(cores: int, sharers: int) -> None:
    """Give torch a thread for each core of this rank, unless the environment says otherwise.

    Left alone, four unbound ranks on a node of 64 cores would run 256 threads; or four: MKL, which
    torch's CPU wheel asks, gives one thread to a process that an MPI launcher started, also where
    it is alone on the node.

    Args:
        cores: Cores that this rank can count as its own.
        sharers: Ranks of this node that may run where it does, this one included.
    """
    global _rule
    for name in CHOSEN_BY:
        if name in os.environ:
            _rule = f"{name}={os.environ[name]}"
            return
    import torch

    torch.set_num_threads(cores)
    _rule = "its cores" if sharers == 1 else f"its part of the cores that {sharers} ranks share"


def rule() -> str:
    """Why torch has as many threads as it has."""
    return _rule
