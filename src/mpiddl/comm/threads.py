"""How many threads torch has in a rank."""

from __future__ import annotations

import os

__all__ = ["limit_torch_threads"]


def limit_torch_threads(cores: int) -> None:
    """Give torch one thread a core, unless OMP_NUM_THREADS says otherwise.

    Left alone, every rank starts a thread for each core it may run on: four unbound ranks on a
    node of 64 cores would run 256 threads.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
