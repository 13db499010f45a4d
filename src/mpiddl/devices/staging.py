"""GPU memory as messages where MPI cannot read it: through pinned host memory, piece by piece.

    sender    GPU --copy--> pinned --MPI-->     receiver    pinned --copy--> GPU

While one piece is on the wire the next one is copied: each message has DEPTH pieces under way.
"""

from __future__ import annotations

from collections import defaultdict, deque

from mpiddl.base.segments import chunked
from mpiddl.base.waits import ALREADY, Wait
from mpiddl.comm.kept import keep_until
from mpiddl.comm.messages import ByteMessages
from mpiddl.devices.cuda.runtime import Runtime
from mpiddl.devices.cuda.streams import Event, Events

__all__ = ["PIECE_BYTES", "Stage", "StagedMessages"]

PIECE_BYTES = 4 << 20
"""Of GPU memory in one MPI message, the same on every rank."""

DEPTH = 2
"""Pieces of a message under way; more messages of a pipelined collective come on top."""
LEAST_BYTES = 4 << 10


class Stage:
    """Pinned memory of one GPU, and a stream for each direction: PCIe carries both at once.

    Args:
        runtime: CUDA.
        events: Of the same GPU.
    """

    def __init__(self, runtime: Runtime, events: Events) -> None:
        self._runtime = runtime
        self._events = events
        self._out, self._in = runtime.make_stream(), runtime.make_stream()
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def take(self, nbytes: int) -> int:
        """Pinned memory for a piece."""
        size = _rounded(nbytes)
        kept = self._free[size]
        return kept.pop() if kept else self._runtime.pinned(size)

    def give_back(self, slot: int, nbytes: int) -> None:
        """What ``take`` gave; nothing copies from or to it any more."""
        self._free[_rounded(nbytes)].append(slot)

    def copy_out(self, slot: int, address: int, nbytes: int) -> Event:
        """From the GPU; done when it is in ``slot``."""
        self._runtime.copy(slot, address, nbytes, self._out)
        return self._events.after(self._out)

    def copy_in(self, address: int, slot: int, nbytes: int) -> Event:
        """To the GPU; done when ``slot`` is free again."""
        self._runtime.copy(address, slot, nbytes, self._in)
        return self._events.after(self._in)


def _rounded(nbytes: int) -> int:
    return max(LEAST_BYTES, 1 << (nbytes - 1).bit_length())


class StagedMessages:
    """Messages of GPU memory between ranks, as those of host memory.

    What is sent must be written when ``send`` is called, and what is received into must be
    read: callers wait for a fence before.

    Args:
        stage: Of the GPU.
        inner: Carries host memory.
    """

    def __init__(self, stage: Stage, inner: ByteMessages) -> None:
        self._stage = stage
        self._inner = inner
        self._lines: dict[int, _Line] = {}

    def send(self, address: int, nbytes: int, peer: int, tag: int, owner: object) -> Wait:
        return self._start(_Outgoing, address, nbytes, peer, tag, owner)

    def receive(self, address: int, nbytes: int, peer: int, tag: int, owner: object) -> Wait:
        return self._start(_Incoming, address, nbytes, peer, tag, owner)

    def _start(
        self,
        kind: type[_Message],
        address: int,
        nbytes: int,
        peer: int,
        tag: int,
        owner: object,
    ) -> Wait:
        if nbytes == 0:
            return ALREADY
        line = self._lines.get(tag)
        if line is None or not line:
            # Lines that are empty are forgotten now and then, not one by one.
            self._lines = {tag: line for tag, line in self._lines.items() if line}
            line = self._lines[tag] = _Line()
        message = kind(self._stage, self._inner, line, address, nbytes, peer, tag, owner)
        line.add((kind, peer), message)
        return message

    def give_up(self) -> None:
        """Nobody asks after those under way any more: the world closes."""
        for line in self._lines.values():
            line.give_up()


class _Line:
    """The messages of one tag under way. Whoever asks after one of them helps on all, since
    what another rank waits for may be one that nobody here asks after."""

    def __init__(self) -> None:
        self._queues: dict[object, deque[_Message]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, key: object, message: _Message) -> None:
        self._queues.setdefault(key, deque()).append(message)
        self.help()

    def help(self) -> None:
        for key, queue in list(self._queues.items()):
            first = True  # messages between two ranks are posted in order
            for message in queue:
                message.help(first)
                first = first and message.all_posted
            while queue and queue[0].complete:
                queue.popleft()
            if not queue:
                del self._queues[key]

    def give_up(self) -> None:
        for queue in self._queues.values():
            for message in queue:
                message.give_up()


class _Piece:
    """A part of a message on its way.

    Attributes:
        at: Where in GPU memory.
        nbytes: How many.
        slot: Where in pinned memory.
        waits: For what it waits now.
    """

    __slots__ = ("at", "nbytes", "slot", "waits")

    def __init__(self, at: int, nbytes: int, slot: int) -> None:
        self.at = at
        self.nbytes = nbytes
        self.slot = slot
        self.waits: Wait = ALREADY


class _Message:
    """A message in pieces. A Wait: done when all of it has gone, or has come.

    Attributes:
        all_posted: MPI knows of every piece, so the next message may be posted.
        complete: All is over.
    """

    def __init__(
        self,
        stage: Stage,
        inner: ByteMessages,
        line: _Line,
        address: int,
        nbytes: int,
        peer: int,
        tag: int,
        owner: object,
    ) -> None:
        self._stage = stage
        self._owner = owner
        self._inner = inner
        self._line = line
        self._address = address
        self._peer = peer
        self._tag = tag
        self._ahead = deque(chunked(slice(0, nbytes), PIECE_BYTES))
        self._unposted: deque[_Piece] = deque()
        self._posted: deque[_Piece] = deque()
        self._copied: deque[_Piece] = deque()
        self.all_posted = False
        self.complete = False

    def give_up(self) -> None:
        """MPI knows of pinned memory alone, which is never freed; but the GPU copies from and to
        that of the owner."""
        for piece in (*self._unposted, *self._copied):
            keep_until(piece.waits.done, self._owner)

    def done(self) -> bool:
        if not self.complete:
            self._line.help()
        return self.complete

    def help(self, may_post: bool) -> None:
        """Go on as far as possible without waiting."""
        raise NotImplementedError

    def _next(self) -> _Piece | None:
        """A new piece, if there is one and not too many are under way."""
        under_way = len(self._unposted) + len(self._posted) + len(self._copied)
        if not self._ahead or under_way >= DEPTH:
            return None
        part = self._ahead.popleft()
        nbytes = part.stop - part.start
        return _Piece(self._address + part.start, nbytes, self._stage.take(nbytes))

    def _finish(self, pieces: deque[_Piece]) -> None:
        """Forget those at the head of ``pieces`` that are done."""
        while pieces and pieces[0].waits.done():
            piece = pieces.popleft()
            self._stage.give_back(piece.slot, piece.nbytes)

    def _note(self) -> None:
        self.all_posted = not self._ahead and not self._unposted
        self.complete = self.all_posted and not self._posted and not self._copied


class _Outgoing(_Message):
    """Pieces are copied out, then posted."""

    def help(self, may_post: bool) -> None:
        self._finish(self._posted)
        while (new := self._next()) is not None:
            new.waits = self._stage.copy_out(new.slot, new.at, new.nbytes)
            self._unposted.append(new)
        while may_post and self._unposted and self._unposted[0].waits.done():
            piece = self._unposted.popleft()
            piece.waits = self._inner.send(
                piece.slot, piece.nbytes, self._peer, self._tag, self._owner
            )
            self._posted.append(piece)
        self._note()


class _Incoming(_Message):
    """Pieces are posted, then copied in."""

    def help(self, may_post: bool) -> None:
        self._finish(self._copied)
        while self._posted and self._posted[0].waits.done():
            piece = self._posted.popleft()
            piece.waits = self._stage.copy_in(piece.at, piece.slot, piece.nbytes)
            self._copied.append(piece)
        while may_post and (new := self._next()) is not None:
            new.waits = self._inner.receive(
                new.slot, new.nbytes, self._peer, self._tag, self._owner
            )
            self._posted.append(new)
        self._note()
