"""One buffer from one rank to another, after a note that says what it is."""

from __future__ import annotations

import ctypes

from mpiddl.base.waits import AllOf, Queue, Wait, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of
from mpiddl.errors import MismatchError

__all__ = ["receive", "send"]

NOTE_BYTES = 64


def send(buffer: Buffer, peer: int, channel: Channel) -> Waits[None]:
    """Send ``buffer`` to rank ``peer``."""
    # At once: messages of one tag go in the order in which they were asked for.
    queue = _queue("send", peer, channel)
    return _send(buffer, peer, channel, queue, queue.ticket())


def _send(buffer: Buffer, peer: int, channel: Channel, queue: Queue, ticket: Wait) -> Waits[None]:
    device = device_of(buffer)
    note = bytearray(_describe(buffer).encode().ljust(NOTE_BYTES))
    yield device.fence()
    yield ticket
    noted = channel.world.messages.send(*_memory(note), peer, channel.tag, note)
    sent = AllOf([noted, channel.send(buffer, peer)])
    if device.late:  # it may be posted piece by piece, and the next note would overtake it
        yield sent
    queue.leave()
    yield sent


def receive(buffer: Buffer, peer: int, channel: Channel) -> Waits[None]:
    """Receive what rank ``peer`` sends.

    Raises:
        MismatchError: It sent another length or dtype.
    """
    queue = _queue("receive", peer, channel)
    return _receive(buffer, peer, channel, queue, queue.ticket())


def _receive(
    buffer: Buffer, peer: int, channel: Channel, queue: Queue, ticket: Wait
) -> Waits[None]:
    device = device_of(buffer)
    note = bytearray(NOTE_BYTES)
    yield device.fence()
    yield ticket
    # Both at once: a second receive of this tag may be started before the note is here.
    noted = channel.world.messages.receive(*_memory(note), peer, channel.tag, note)
    arrived = channel.receive(buffer, peer)
    if not device.late:  # else it may be posted piece by piece, as in ``send``
        queue.leave()
    yield noted
    sent = note.decode().strip()
    fits = sent == _describe(buffer)
    if fits:
        yield arrived
    if device.late:
        queue.leave()
    if not fits:
        raise MismatchError(
            f"rank {peer} sent {sent}, rank {channel.rank} receives {_describe(buffer)}; pass a "
            "tensor of that dtype and number of elements, and match sends and receives by tag"
        )


def _memory(note: bytearray) -> tuple[int, int]:
    """Address and bytes, in host memory: it is posted at once, whatever carries the buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(note)), len(note)


class _Queues(dict[tuple[str, int, int], Queue]):
    """Messages of one tag go in the order in which they were started, however long each waits for
    its fence."""

    def __init__(self, world: World) -> None:
        super().__init__()


def _queue(direction: str, peer: int, channel: Channel) -> Queue:
    queues = channel.world.service(_Queues)
    return queues.setdefault((direction, peer, channel.tag), Queue())


def _describe(buffer: Buffer) -> str:
    return f"{str(buffer.dtype).removeprefix('torch.')}[{len(buffer)}]"
