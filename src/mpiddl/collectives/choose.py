"""Which algorithm runs an all-reduce: what the user forces, else the built-in rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mpiddl.collectives.channel import Channel
from mpiddl.collectives.direct import direct_all_reduce
from mpiddl.collectives.doubling import doubling_all_reduce
from mpiddl.collectives.library import library_all_reduce
from mpiddl.collectives.reduction import DTYPES, Reduction
from mpiddl.collectives.reference import reference_all_reduce
from mpiddl.collectives.ring import ring_all_reduce
from mpiddl.comm.native import NATIVE_DTYPES
from mpiddl.devices.base import Buffer, Device
from mpiddl.errors import UnsupportedBufferError
from mpiddl.settings import ALGORITHM_NAMES
from mpiddl.waits import Waits

__all__ = ["ALGORITHMS", "Algorithm", "AllReduce", "choose"]


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
        run: The generator function.
        dtypes: What it can reduce.
        ordered: Every rank must start these collectives in the same order (a library runs
            them); the others may be started in any order.
    """

    run: AllReduce
    dtypes: frozenset[torch.dtype] = frozenset(DTYPES)
    ordered: bool = False


ALGORITHMS = {
    "ring": Algorithm(ring_all_reduce),
    "doubling": Algorithm(doubling_all_reduce),
    "direct": Algorithm(direct_all_reduce),
    "library": Algorithm(
        library_all_reduce,
        dtypes=frozenset(getattr(torch, name) for name in NATIVE_DTYPES),
        ordered=True,
    ),
    "reference": Algorithm(reference_all_reduce),
}


def choose(name: str, dtype: torch.dtype) -> Algorithm:
    """The algorithm called ``name``; ``"auto"`` is the ring.

    Raises:
        ValueError: No algorithm has that name.
        UnsupportedBufferError: It cannot reduce ``dtype``.
    """
    if name not in ALGORITHM_NAMES:
        raise ValueError(f"unknown algorithm {name!r}; valid are {', '.join(ALGORITHM_NAMES)}")
    algorithm = ALGORITHMS["ring" if name == "auto" else name]
    if dtype not in algorithm.dtypes:
        listed = ", ".join(sorted(str(known) for known in algorithm.dtypes))
        raise UnsupportedBufferError(f"algorithm {name!r} cannot reduce {dtype}, only {listed}")
    return algorithm
