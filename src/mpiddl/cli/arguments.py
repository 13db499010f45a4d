"""Options that commands share, and how they are checked."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated

import typer

from mpiddl.base.units import parse_sizes

if TYPE_CHECKING:
    from mpiddl.comm.world import World

__all__ = ["MOST_ROUNDS", "Device", "check_sizes", "finite", "init_on"]

MOST_ROUNDS = 100_000
"""Timings of more would fill the memory."""


def finite(value: float | None) -> float | None:
    """``value``, unless it is infinite or no number, which typer's own limits let pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def check_sizes(text: str) -> str:
    """``text``, if ``parse_sizes`` understands it."""
    try:
        if min(parse_sizes(text)) < 8:
            raise ValueError("sizes must be at least 8B")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _check_device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise typer.BadParameter(f"{text!r} is none of cpu, cuda, cuda:N")
    return text


Device = Annotated[
    str,
    typer.Option(
        callback=_check_device,
        help="Where buffers are: cpu, cuda (each rank's own GPU) or cuda:N (the same for all).",
    ),
]


def init_on(device: str) -> World:
    """``mpiddl.init`` on a device that can be used. Collective.

    Raises:
        LaunchError: There is no such device.
        PeerError: On every rank, if CuPy is missing on one.
    """
    from mpiddl.api.objects import gather_json
    from mpiddl.comm.world import init
    from mpiddl.devices.registry import device_at
    from mpiddl.errors import LaunchError, MpiddlError, PeerError, UnsupportedBufferError

    try:
        world = init(device=device)
    except MpiddlError:  # says more
        raise
    except ValueError as error:
        raise LaunchError(str(error)) from None
    problem = None
    try:
        device_at(world.device)
    except UnsupportedBufferError as error:
        problem = f"rank {world.rank}: {error}"
    problems = [text for text in gather_json(problem, world=world) if text is not None]
    if problems:
        raise PeerError(problems[0])
    return world
