"""SIGUSR1: the job is to save a checkpoint and leave, for it will be started again."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from mpiddl.api.all_reduce import all_reduce
from mpiddl.comm.world import World

__all__ = ["is_any_rank_asked", "listen"]

_asked = False


def listen() -> None:
    """From now on SIGUSR1 does not end this process, but is remembered."""
    signal.signal(signal.SIGUSR1, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True


def is_any_rank_asked(world: World) -> bool:
    """Whether a rank has got the signal: the same answer on every rank. Collective."""
    flag = torch.tensor([int(_asked)], dtype=torch.int32, device="cpu")
    all_reduce(flag, op="max", world=world)
    return bool(flag.item())
