"""Buffers from one rank to another: messages that share a tag."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch

from mpiddl.base.waits import ALREADY, Wait
from mpiddl.collectives.node.lane import Lane
from mpiddl.comm.layout import Layout
from mpiddl.comm.messages import Credits
from mpiddl.comm.native import Native
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of
from mpiddl.observe.events import Kind, record, recorder

__all__ = ["Channel", "MessageChannel", "bytes_of"]


class Channel(Protocol):
    """The messages of one collective, as its algorithm sees them.

    Attributes:
        world: The ranks.
        rank: This process among the ranks that take part.
        size: Number of ranks that take part.
        layout: Which of the world's ranks are on which node.
        lane: Where the ranks of this node meet in shared memory; None: nowhere.
        native: The MPI library's own collectives.
        tag: Tells these messages from all others.
    """

    world: World
    rank: int
    size: int
    layout: Layout
    lane: Lane | None
    native: Native
    tag: int

    def among(self, ranks: Sequence[int]) -> Channel:
        """The same messages between some ranks only, this one among them; numbered from 0."""
        ...

    def send(self, buffer: Buffer, peer: int) -> Wait:
        """Send ``buffer``, which must stay as it is until the wait is done."""
        ...

    def room_after(self, outstanding: Sequence[Wait]) -> Wait:
        """Done when one more message may be sent after these, which are not known to be done."""
        ...

    def send_after(self, outstanding: Sequence[Wait], buffer: Buffer, peer: int) -> Wait:
        """As ``send``; counts for ``room_after`` unless it is the only one outstanding."""
        ...

    def receive(self, buffer: Buffer, peer: int) -> Wait:
        """``buffer`` holds what ``peer`` sent once the wait is done."""
        ...


class MessageChannel:
    """One collective's messages, kept apart from all others by their tag.

    Two collectives on one channel must not overlap; one after the other is fine, since
    messages of a tag between two ranks keep their order.

    Args:
        world: The ranks.
        tag: A tag of ``world.tags``.
        native: The MPI library's collectives, for algorithms that it runs; default the world's own.
        lane: The lane for algorithms that go through shared memory.
        room: A bound on messages beyond the first; default none.
        urgency: The urgency of this collective among those that share the room.
    """

    __slots__ = (
        "_ranks",
        "_room",
        "_urgency",
        "lane",
        "layout",
        "native",
        "rank",
        "size",
        "tag",
        "world",
    )

    def __init__(
        self,
        world: World,
        tag: int,
        native: Native | None = None,
        lane: Lane | None = None,
        room: Credits | None = None,
        urgency: int = 0,
    ) -> None:
        self.native = native or world.native
        self._room = room
        self._urgency = urgency
        self.lane = lane
        self.layout = world.layout
        self.world = world
        self.tag = tag
        self.rank = world.rank
        self.size = world.size
        self._ranks: Sequence[int] = range(world.size)

    def among(self, ranks: Sequence[int]) -> MessageChannel:
        """The same messages between some ranks only, this one among them; numbered from 0."""
        part = copy(self)
        part.rank = ranks.index(self._ranks[self.rank])
        part.size = len(ranks)
        part._ranks = ranks
        return part

    def send(self, buffer: Buffer, peer: int) -> Wait:
        """``buffer`` must stay as it is until the wait is done."""
        if recorder.tracing:
            record(Kind.CHUNK, 0, self.tag, buffer.nbytes)
        messages = device_of(buffer).messages(self.world)
        return messages.send(buffer.data_ptr(), buffer.nbytes, self._ranks[peer], self.tag, buffer)

    def room_after(self, outstanding: Sequence[Wait]) -> Wait:
        """Done when one more message may be sent after these, which are not known to be done.

        What is posted first goes first. So collectives that have sent much wait here, where the
        engine asks the most urgent one first.
        """
        if self._room is None or not outstanding:
            return ALREADY
        return _Room(self._room, self._urgency, outstanding)

    def send_after(self, outstanding: Sequence[Wait], buffer: Buffer, peer: int) -> Wait:
        """As ``send``; counts for ``room_after`` unless it is the only one outstanding."""
        wait = self.send(buffer, peer)
        if self._room is not None and outstanding:
            self._room.take(wait)
        return wait

    def receive(self, buffer: Buffer, peer: int) -> Wait:
        """``buffer`` holds what ``peer`` sent once the wait is done."""
        messages = device_of(buffer).messages(self.world)
        return messages.receive(
            buffer.data_ptr(), buffer.nbytes, self._ranks[peer], self.tag, buffer
        )


class _Room:
    """Done when there is a credit, or none is needed."""

    __slots__ = ("_outstanding", "_room", "_urgency")

    def __init__(self, room: Credits, urgency: int, outstanding: Sequence[Wait]) -> None:
        self._room = room
        self._urgency = urgency
        self._outstanding = outstanding

    def done(self) -> bool:
        if self._room.left:
            return True
        return self._urgency >= self._room.first and all(send.done() for send in self._outstanding)


def bytes_of(tensor: torch.Tensor) -> Buffer:
    """A dense tensor's memory, whatever its dtype and order of dimensions, as bytes.

    Raises:
        ValueError: The elements are not one gapless piece of memory.
    """
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)
