"""Broadcast down a binomial tree, in chunks that are passed on as they arrive."""

from __future__ import annotations

from collections import deque
from itertools import islice

from mpiddl.base.segments import chunked
from mpiddl.base.waits import AllOf, Wait, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of

__all__ = ["broadcast", "tree"]

DEPTH = 16
"""Chunks under way on each link of the tree."""


def tree(rank: int, size: int, root: int) -> tuple[int | None, list[int]]:
    """Parent and children of ``rank`` in the binomial tree over ``size`` ranks.

    Counted from the root, a rank's parent is the number without its lowest set bit. Children
    with the largest subtrees come first.
    """
    place = (rank - root) % size
    lowest = place & -place if place else 1 << (size - 1).bit_length()
    parent = (place - lowest + root) % size if place else None
    bits = [1 << bit for bit in reversed(range(lowest.bit_length() - 1))]
    return parent, [(place + bit + root) % size for bit in bits if place + bit < size]


def broadcast(buffer: Buffer, root: int, channel: Channel, chunk_bytes: int) -> Waits[None]:
    """Copy ``buffer`` of rank ``root`` to all ranks. Every rank passes the same length.

    No scratch; up to DEPTH chunks are under way on each link. Waits go from parent to child for
    chunks and from child to parent for room, but for room only DEPTH chunks back: no circle.
    """
    yield device_of(buffer).fence()
    parent, children = tree(channel.rank, channel.size, root)
    chunk = max(1, chunk_bytes // buffer.itemsize)
    pieces = [buffer[part] for part in chunked(slice(0, len(buffer)), chunk)]
    arriving: deque[Wait] = deque()
    sends: deque[Wait] = deque()
    ahead = iter(pieces)
    for piece in pieces:
        if parent is not None:
            for later in islice(ahead, DEPTH - len(arriving)):
                arriving.append(channel.receive(later, parent))
            yield arriving.popleft()
        if len(sends) == DEPTH:
            yield sends.popleft()
        sends.append(AllOf([channel.send(piece, child) for child in children]))
    yield AllOf(sends)
