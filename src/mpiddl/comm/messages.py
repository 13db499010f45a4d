"""Raw bytes from one rank to another, as Waits.

MPI moves bytes and nothing else (``MPI.BYTE`` on raw addresses): every dtype, and later GPU
memory, travels the same way, and adding is ours. Messages of one tag between two ranks
arrive in the order in which they were sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from mpiddl.base.segments import chunked
from mpiddl.base.waits import ALREADY, AllOf, Wait
from mpiddl.comm.kept import forget_one, keep_until
from mpiddl.errors import TagError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["LARGEST_MESSAGE", "ByteMessages", "Credits", "Messages", "RequestWait", "Tags"]

LARGEST_MESSAGE = 1 << 30
"""Bytes per MPI message: counts stay below 2**31 on every MPI."""


class RequestWait:
    """Done when an MPI request is complete.

    MPI reads or writes memory of ``owner`` until then, whoever has stopped to wait meanwhile: so
    long it is kept.
    """

    __slots__ = ("_owner", "_request", "done")

    def __init__(self, request: MPI.Request, owner: object) -> None:
        self._request = request
        self._owner = owner
        self.done: Callable[[], bool] = request.Test

    def __del__(self) -> None:
        if self._request:  # one that is complete is MPI_REQUEST_NULL
            keep_until(self.done, self._owner)


class Credits:
    """A bound on sends in flight, so that an urgent message is not behind a long queue.

    A collective sends its first message without a credit, and so does the most urgent collective
    under way whenever it has none outstanding. With that none can wait for ever: every rank starts
    all of them sooner or later, gives them the same urgency, and so completes the most urgent one,
    then the next. More messages without a credit, one for each collective, would fill a slow link:
    thirty buckets of 512 KiB chunks are 130 ms of a gigabit.

    Attributes:
        first: The urgency of the most urgent collective under way.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sends: list[Wait] = []
        self._under_way: set[int] = set()
        self.first = -1

    def enter(self, urgency: int) -> None:
        """A collective begins; of two, the one with the higher ``urgency`` is to be first."""
        self._under_way.add(urgency)
        self.first = max(self._under_way)

    def leave(self, urgency: int) -> None:
        """It is over."""
        self._under_way.discard(urgency)
        self.first = max(self._under_way, default=-1)

    def take(self, send: Wait) -> None:
        """Count ``send`` until it is done."""
        self._sends.append(send)

    @property
    def left(self) -> bool:
        """Whether there is room for one more."""
        if len(self._sends) >= self._limit:
            self._sends = [send for send in self._sends if not send.done()]
        return len(self._sends) < self._limit


class ByteMessages(Protocol):
    """What carries bytes between ranks."""

    def send(self, address: int, nbytes: int, peer: int, tag: int, owner: object) -> Wait:
        """Send ``nbytes`` from ``address``; they must stay as they are until the wait is done.

        ``owner``, whose memory that is, lives as long, also where the wait is dropped before.
        """
        ...

    def receive(self, address: int, nbytes: int, peer: int, tag: int, owner: object) -> Wait:
        """Receive ``nbytes`` into ``address``, memory of ``owner`` as in ``send``; they may be read
        once the wait is done."""
        ...


class Messages:
    """Non-blocking byte messages on one private communicator.

    Args:
        comm: The communicator.
        largest: Bytes of an MPI message; larger ones go in pieces, on both sides.
    """

    def __init__(self, comm: MPI.Comm, largest: int = LARGEST_MESSAGE) -> None:
        from mpi4py import MPI

        self._comm = comm
        self._largest = largest
        self._byte = MPI.BYTE
        self._memory = MPI.memory.fromaddress

    def in_pieces(self, largest: int) -> Messages:
        """The same, in MPI messages of at most ``largest`` bytes."""
        return Messages(self._comm, largest)

    def send(self, address: int, nbytes: int, peer: int, tag: int, owner: object) -> Wait:
        """Send ``nbytes`` of ``owner``'s memory from ``address``; they must stay as they are until
        the wait is done."""
        return self._start(self._comm.Isend, address, nbytes, peer, tag, owner)

    def receive(self, address: int, nbytes: int, peer: int, tag: int, owner: object) -> Wait:
        """Receive ``nbytes`` into ``owner``'s memory at ``address``; they may be read once the wait
        is done."""
        return self._start(self._comm.Irecv, address, nbytes, peer, tag, owner)

    def _start(
        self,
        start: Callable[..., MPI.Request],
        address: int,
        nbytes: int,
        peer: int,
        tag: int,
        owner: object,
    ) -> Wait:
        forget_one()
        if nbytes <= self._largest:
            if nbytes == 0:  # both sides know the length: nothing to say
                return ALREADY
            request = start([self._memory(address, nbytes), self._byte], peer, tag)
            return RequestWait(request, owner)
        pieces = chunked(slice(0, nbytes), self._largest)
        return AllOf(
            self._start(start, address + piece.start, piece.stop - piece.start, peer, tag, owner)
            for piece in pieces
        )


class Tags:
    """Message tags of one communicator; every rank must allot and give back in the same order.

    Collectives that users start take short-lived tags in turn; a gradient bucket keeps its own;
    the last ones are those that users name in send and recv. The standard grants tags up to 32767.

    Attributes:
        last: The last tag that ``foreground`` returned.
    """

    FOREGROUND = 8192
    USER = 256
    LARGEST = 32767

    def __init__(self) -> None:
        self.last = -1
        self._free = list(range(self.FOREGROUND, self.LARGEST + 1 - self.USER))

    def foreground(self) -> int:
        """A tag for one collective. It is used again after 8,192 others."""
        self.last = (self.last + 1) % self.FOREGROUND
        return self.last

    def of_user(self, tag: int) -> int:
        """The tag of a user's message ``tag``.

        Raises:
            ValueError: Not in 0..255.
        """
        if not 0 <= tag < self.USER:
            raise ValueError(f"tag {tag} is not one of 0..{self.USER - 1}")
        return self.LARGEST + 1 - self.USER + tag

    def keep(self, count: int) -> list[int]:
        """``count`` tags, until they are given back.

        Raises:
            TagError: So many are not left.
        """
        if count > len(self._free):
            raise TagError(
                f"{count} message tags wanted for gradient buckets, {len(self._free)} left; use a "
                "larger bucket_size, unwrap() models that are not trained any more, or wrap on a "
                "world.split()"
            )
        kept, self._free = self._free[:count], self._free[count:]
        return kept

    def give_back(self, tags: list[int]) -> None:
        """These tags may be used again."""
        self._free = sorted(self._free + tags)
