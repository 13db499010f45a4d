"""Which GPU belongs to a rank, and who shares it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpiddl.base.log import logger
from mpiddl.comm.layout import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["choose_device", "identity", "report", "sharing", "use_gpu"]

SIGNS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
"""Of a driver: containers have the one or the other."""


def choose_device(wanted: str | torch.device | None, local_rank: int | None) -> str:
    """Where tensors of this rank belong; a GPU becomes torch's current device.

    Args:
        wanted: What the user chose; None: the GPU of this rank's number, counted round the visible
            ones, or the CPU where there is none.
        local_rank: As the launcher announced it; None: this process is alone.

    Raises:
        ValueError: No such device.
    """
    # To import torch takes a second: not for jobs on nodes without a GPU that do not use it.
    likely = "torch" in sys.modules or any(sign.exists() for sign in SIGNS)
    if str(wanted) == "cpu" or (wanted is None and not likely):
        return "cpu"
    import torch

    count = torch.cuda.device_count()
    if wanted is None and count == 0:
        return "cpu"
    place = torch.device("cuda" if wanted is None else wanted)
    if place.type != "cuda":
        raise ValueError(f"device {str(wanted)!r} is none of 'cpu', 'cuda', 'cuda:N'")
    index = (local_rank or 0) % max(1, count) if place.index is None else place.index
    if index >= count:
        hint = "look at CUDA_VISIBLE_DEVICES and at `mpiddl doctor`"
        if torch.version.cuda is None:
            hint = "this torch was built without CUDA: install one with, or pass device='cpu'"
        raise ValueError(f"device {str(wanted)!r} does not exist: torch sees {count} GPUs; {hint}")
    use_gpu(index)
    return f"cuda:{index}"


def use_gpu(index: int) -> None:
    """A GPU becomes the calling thread's, with the context that MPI may look for."""
    import torch

    torch.cuda.set_device(index)  # makes none where it is the present one already: the first
    torch.cuda.current_stream(index).synchronize()


def identity(place: str) -> str | None:
    """What names a GPU on its node, whatever is visible to whom; None for the CPU."""
    if place == "cpu":
        return None
    import torch

    properties = torch.cuda.get_device_properties(place)
    return str(getattr(properties, "uuid", None) or f"{properties.name} {place}")


def sharing(identities: Sequence[str | None], layout: Layout) -> int:
    """The most ranks that use one GPU; 0 without GPUs."""
    used = Counter(
        (node, identities[rank])
        for node, ranks in enumerate(layout.nodes)
        for rank in ranks
        if identities[rank] is not None
    )
    return max(used.values(), default=0)


def report(sharers: int, rank: int) -> None:
    """Say so, once, if ranks share a GPU."""
    if sharers > 1 and rank == 0:
        logger.warning(
            "up to %d ranks share a GPU: their kernels take turns, and NCCL cannot be used; start "
            "one rank per GPU for speed",
            sharers,
        )
