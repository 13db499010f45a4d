"""What is a rank's own: running statistics, generators, its place in a stream.

A checkpoint holds rank 0's states, and of every other rank what differs from them. So each rank
gets its own back, and no rank a mixture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import torch

from mpiddl.api.barrier import barrier
from mpiddl.api.call import new_channel, run
from mpiddl.base.plain import digest
from mpiddl.base.segments import chunked
from mpiddl.base.waits import Waits
from mpiddl.checkpoint.tensors import PIECE_BYTES, Kind
from mpiddl.collectives.channel import Channel
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer

__all__ = ["PARTS", "differences", "digests", "in_turn", "name_of", "parts_of", "receive", "send"]

PARTS = "parts"
SIGN_BYTES = 256 << 20
"""After so many bytes between rank 0 and others all ranks meet: who waits for its turn sees that
it goes on."""


def name_of(rank: int, what: int | str) -> str:
    """Of a rank's own tensor ``what``, or of its states as JSON, in the files."""
    return f"{rank}.{what}"


def digests(encoded: Any, tensors: Sequence[torch.Tensor]) -> list[str]:
    """Of a rank's states as JSON, then of each tensor."""
    return [digest(_text(encoded)), *map(digest, tensors)]


def differences(
    encoded: Any, tensors: Sequence[torch.Tensor], mine: Sequence[str], first: Sequence[str]
) -> dict[int | str, torch.Tensor]:
    """What this rank has that rank 0 has not.

    Args:
        encoded: This rank's states as JSON.
        tensors: Those in it, by number.
        mine: Its ``digests``.
        first: Rank 0's.
    """
    found: dict[int | str, torch.Tensor] = {}
    if mine[0] != first[0]:
        found[PARTS] = _text(encoded)
    theirs = first[1:]
    for number, (tensor, own) in enumerate(zip(tensors, mine[1:], strict=True)):
        if number >= len(theirs) or own != theirs[number]:
            found[number] = tensor
    return found


def _text(encoded: Any) -> torch.Tensor:
    text = bytearray(json.dumps(encoded, allow_nan=False).encode())
    return torch.from_numpy(numpy.frombuffer(text, numpy.uint8))


def parts_of(text: torch.Tensor) -> Any:
    """A rank's states as JSON, as they were before they became a tensor."""
    return json.loads(text.numpy().tobytes())


def in_turn(
    world: World,
    kinds: Iterable[tuple[str, Kind]],
    to_do: Callable[[int, str, Kind, Channel], None],
) -> None:
    """Between rank 0 and each other rank, one tensor after the other. Collective.

    Args:
        world: The ranks.
        kinds: Of each tensor that is a rank's own, by name; the same on every rank.
        to_do: Called on rank 0 and on the rank that owns it, with that rank, the tensor's name and
            kind, and where it is sent.
    """
    channel = new_channel(world)
    moved = 0
    for name, kind in kinds:
        owner = int(name.partition(".")[0])
        if world.rank in (0, owner):
            to_do(owner, name, kind, channel)
        moved += kind.nbytes
        if moved >= SIGN_BYTES:
            barrier(world=world)
            moved = 0


def send(piece: Buffer, peer: int, channel: Channel) -> None:
    """Send bytes on the host to ``peer``, however many."""
    run(channel.world, _send(piece, peer, channel))


def receive(piece: Buffer, peer: int, channel: Channel) -> None:
    """Fill ``piece`` with the bytes that ``peer`` sends."""
    run(channel.world, _receive(piece, peer, channel))


def _send(piece: Buffer, peer: int, channel: Channel) -> Waits[None]:
    for part in chunked(slice(0, len(piece)), PIECE_BYTES):
        yield channel.send(piece[part], peer)


def _receive(piece: Buffer, peer: int, channel: Channel) -> Waits[None]:
    for part in chunked(slice(0, len(piece)), PIECE_BYTES):
        yield channel.receive(piece[part], peer)
