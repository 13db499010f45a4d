"""Pieces of bytes from one rank to one rank of every node, and failures told to all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import TypeVar

import numpy
import torch
from numpy.typing import NDArray

from mpiddl.api.broadcast import broadcast
from mpiddl.api.fail_together import raise_together
from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World
from mpiddl.data.moving.progress_bar import progress
from mpiddl.errors import DataError

__all__ = ["PIECE_BYTES", "Relay", "check_same_root", "reason_of", "writers_of"]

PIECE_BYTES = 16 << 20
SIGN_BYTES = 4 << 30
"""After so much all ranks hear that it goes on, or that it does not."""

T = TypeVar("T")
Piece = NDArray[numpy.uint8]


def reason_of(error: OSError) -> str:
    """Why, without the number and the file."""
    return error.strerror or str(error)


def check_same_root(root: int | None, world: World) -> None:
    """Raise DataError on every rank if ``root`` is not the same one everywhere. Collective."""
    roots = gather_json(root, world=world)
    odd = next((rank for rank, other in enumerate(roots) if other != roots[0]), None)
    if odd is not None:
        raise DataError(
            f"rank 0 passed root={roots[0]}, rank {odd} root={roots[odd]}; pass the same one on "
            "every rank",
            on_every_rank=True,
        )
    if root is not None and not 0 <= root < world.size:
        raise DataError(f"root {root} is no rank of a world of {world.size}", on_every_rank=True)


def writers_of(world: World, root: int | None) -> list[int]:
    """The rank of each node that writes for it: ``root`` on its own, elsewhere the first."""
    layout = world.layout
    pairs = zip(layout.nodes, layout.firsts, strict=True)
    return [root if root in ranks else first for ranks, first in pairs]


class Relay:
    """Pieces of bytes, from the rank or the ranks that can read them to those that write them.

    Every rank of the world walks through the same pieces, so that failures are heard of by all.
    A rank that fails goes on to take part in what the others do, and reads and writes nothing.

    Args:
        members: The ranks that read or write.
        root: The one that reads for all of them; None: each reads for itself.
        world: The ranks.
        nbytes: Of all pieces together.
        what: Is done, for the progress bar.
    """

    def __init__(
        self, members: Iterable[int], root: int | None, world: World, nbytes: int, what: str
    ) -> None:
        ranks = sorted(members)
        self._takes_part = world.rank in ranks
        self._reads = self._takes_part and root in (None, world.rank)
        self._world = world
        self._group: World | None = None
        self._root = 0
        if root is not None and len(ranks) > 1:
            self._group = world.split(0 if self._takes_part else None)
            self._root = ranks.index(root)
        self._staging = torch.empty(
            min(nbytes, PIECE_BYTES) if self._group else 0, dtype=torch.uint8, device="cpu"
        )
        self._unsigned = 0
        self._what = what
        self._problem: str | None = None
        self._exits = contextlib.ExitStack()
        self._bar = self._exits.enter_context(progress(nbytes, what, world))

    def pass_on(
        self,
        nbytes: int,
        read: Callable[[], Piece] | None,
        write: Callable[[Piece], None] | None,
    ) -> None:
        """The next piece. Collective.

        Args:
            nbytes: Its length, the same on every rank.
            read: Where it comes from: called on the root, or on all members without one.
            write: Where it goes; None on members that do not need it.
        """
        self._unsigned += nbytes
        if self._unsigned >= SIGN_BYTES:
            self.check()
        if not self._takes_part:
            return
        piece = self._attempt(read) if self._reads and read else None
        if self._group is not None:
            buffer = self._buffer(nbytes)
            if piece is not None:
                buffer.numpy()[:] = piece
            broadcast(buffer, self._root, world=self._group)
            piece = buffer.numpy()
        if piece is not None and write is not None:
            self._attempt(partial(write, piece))
        self._bar.advance(nbytes)

    def check(self) -> None:
        """Raise DataError on every rank if one has failed so far. Collective."""
        self._unsigned = 0
        raise_together(self._problem, self._world)

    def _buffer(self, nbytes: int) -> torch.Tensor:
        if nbytes > len(self._staging):
            self._staging = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return self._staging[:nbytes]

    def _attempt(self, action: Callable[[], T]) -> T | None:
        if self._problem is None:
            try:
                return action()
            except OSError as error:
                self._problem = f"{self._what} failed ({reason_of(error)})"
        return None

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exits.close()
        together = error is None or (isinstance(error, DataError) and error.on_every_rank)
        if self._group is not None and together:
            self._group.close()
