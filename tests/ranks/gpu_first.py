"""The GPU of a rank, chosen before MPI starts: an MPI that knows CUDA may look for it then."""

from __future__ import annotations

import torch

from mpiddl.comm.gpus import choose_device
from mpiddl.launch.launchers import read_launch


def choose_gpu():
    """As ``mpiddl.init`` does; nothing where torch sees none."""
    if torch.cuda.is_available():
        choose_device("cuda", read_launch().local_rank)
