"""Broadcast down a binomial tree, in chunks that are passed on as they arrive."""

from __future__ import annotations

from mpiddl.collectives.channel import Channel
from mpiddl.devices.base import Buffer
from mpiddl.segments import chunked
from mpiddl.waits import AllOf, Wait, Waits

__all__ = ["broadcast", "tree"]


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
    """Copy ``buffer`` of rank ``root`` to all ranks. Every rank passes the same length."""
    parent, children = tree(channel.rank, channel.size, root)
    chunk = max(1, chunk_bytes // buffer.itemsize)
    pieces = [buffer[part] for part in chunked(slice(0, len(buffer)), chunk)]
    arriving = [channel.receive(piece, parent) for piece in pieces] if parent is not None else []
    sends: list[Wait] = []
    for number, piece in enumerate(pieces):
        if arriving:
            yield arriving[number]
        sends += [channel.send(piece, child) for child in children]
    yield AllOf(sends)
