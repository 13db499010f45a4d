"""One buffer from one rank to another, after a note that says what it is."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from mpiddl.collectives.channel import Channel
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of
from mpiddl.errors import MismatchError
from mpiddl.waits import AllOf, Queue, Waits

__all__ = ["receive", "send"]

NOTE_BYTES = 64
_written_by_others: list[Buffer] = []
"""A message may still come to these: they may not be used for anything else."""


def send(buffer: Buffer, peer: int, channel: Channel) -> Waits[None]:
    """Send ``buffer`` to rank ``peer``."""
    queue = _queue("send", peer, channel)
    ticket = queue.ticket()
    text = _describe(buffer).encode().ljust(NOTE_BYTES)
    note = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    yield device_of(buffer).fence()
    yield ticket
    sent = AllOf([channel.send(note, peer), channel.send(buffer, peer)])
    queue.leave()
    yield sent


def receive(buffer: Buffer, peer: int, channel: Channel) -> Waits[None]:
    """Receive what rank ``peer`` sends.

    Raises:
        MismatchError: It sent another length or dtype.
    """
    queue = _queue("receive", peer, channel)
    ticket = queue.ticket()
    note = torch.zeros(NOTE_BYTES, dtype=torch.uint8, device="cpu")
    yield device_of(buffer).fence()
    yield ticket
    # Both at once: a second receive of this tag may be started before the note is here.
    noted, arrived = channel.receive(note, peer), channel.receive(buffer, peer)
    queue.leave()
    yield noted
    sent = bytes(note.tolist()).decode().strip()
    if sent != _describe(buffer):
        _written_by_others.append(buffer)
        raise MismatchError(
            f"rank {peer} sent {sent}, rank {channel.rank} receives {_describe(buffer)}; pass a "
            "tensor of that dtype and number of elements, and match sends and receives by tag"
        )
    yield arrived


_queues: WeakKeyDictionary[World, dict[tuple[str, int, int], Queue]] = WeakKeyDictionary()


def _queue(direction: str, peer: int, channel: Channel) -> Queue:
    """Messages of one tag go in the order in which they were started, however long each waits for
    its fence."""
    queues = _queues.setdefault(channel.world, {})
    return queues.setdefault((direction, peer, channel.tag), Queue())


def _describe(buffer: Buffer) -> str:
    return f"{str(buffer.dtype).removeprefix('torch.')}[{len(buffer)}]"
