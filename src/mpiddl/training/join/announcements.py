"""Ranks that still train say what they do next, so that ranks that have left can follow.

Inside ``mpiddl.join`` each collective of the training loop is announced: every rank fills one
row of a table, which all get. A rank that has left its loop reads there what it must take part
in. Outside ``join`` nothing is announced.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from mpiddl.api.all_gather import all_gather
from mpiddl.api.all_reduce import all_reduce
from mpiddl.comm.world import World
from mpiddl.errors import MismatchError
from mpiddl.strategies.weights import attendance_of

__all__ = [
    "Announced",
    "Announcements",
    "Joinable",
    "Operation",
    "all_gather_rows",
    "announcements_of",
    "sum_up",
]

NO_SAMPLES = -1
"""Samples of a rank that trains outside ``model.batch()``: all such ranks weigh the same."""


class Operation(enum.IntEnum):
    """The next action of a rank. In brackets: its subject."""

    LEFT = 0  # nothing more: it takes part in what the others do
    ALL_GATHER = 1  # a row of float64 [its length]
    SUM = 2  # of a row of float64 [its length]
    BEGIN = 3  # a backward whose gradients are reduced [the model's number]
    FINISH = 4  # the end of that backward [the model's number]


@runtime_checkable
class Joinable(Protocol):
    """A model of which a backward can be followed without one of one's own."""

    world: World

    @property
    def holds_unreduced(self) -> bool:
        """Whether ``no_sync`` has left gradients here that no backward has reduced since."""

    def begin_together(self) -> None:
        """Outside ``join()``, on every rank: agree on what must not change inside."""

    def shadow_begin(self, weight: float) -> None:
        """Take part in every bucket with what is in it already; must not block."""

    def shadow_finish(self) -> None:
        """Take part in what the other ranks do at the end of that backward."""


@dataclass(frozen=True)
class Announced:
    """The announcements of all ranks.

    Attributes:
        operation: The operation of all ranks that have not left; LEFT if all have.
        subject: The length of a row, or the number of a model.
        active: The ranks that have not left.
        samples: Samples by rank, NO_SAMPLES outside ``model.batch()``; 0 for ranks that have left.
        holders: For each rank, a bit for each model that holds gradients which are not reduced.
    """

    operation: Operation
    subject: int
    active: Sequence[int]
    samples: Sequence[int]
    holders: Sequence[int]


class Announcements:
    """The announcements of one ``join``.

    Args:
        world: The ranks.
        models: The models that are trained, in the same order on every rank; 62 at most.
        divide_by_world_size: Gradients are divided by the number of all ranks, also when some
            have left.
    """

    complete = False  # ranks that have left do not come to everything

    def __init__(
        self, world: World, models: Sequence[Joinable], divide_by_world_size: bool = False
    ) -> None:
        self.world = world
        self.models = models
        self.root = 0
        """A rank that has not left, or left last; the same on every rank."""
        self._divide_by_world_size = divide_by_world_size

    def announce(
        self, operation: Operation, subject: int = 0, samples: int = NO_SAMPLES
    ) -> Announced:
        """Say what this rank does next, and hear it from all others.

        Raises:
            MismatchError: On every rank: two do different things.
        """
        holds = sum(model.holds_unreduced << number for number, model in enumerate(self.models))
        table = torch.zeros(self.world.size, 4, dtype=torch.int64)
        left = operation is Operation.LEFT
        row = [int(operation), subject, 0 if left else samples, holds]
        table[self.world.rank] = torch.tensor(row)
        all_reduce(table, world=self.world)  # one row each: faster than a gather on one node
        rows = table.tolist()
        active = [rank for rank, row in enumerate(rows) if row[0] != Operation.LEFT]
        for rank in active:
            if rows[rank][:2] != rows[active[0]][:2]:
                raise _different(rows, active[0], rank)
        first = rows[active[0] if active else 0]
        self.root = active[0] if active else self.root
        columns = [[row[column] for row in rows] for column in (2, 3)]
        return Announced(Operation(first[0]), first[1], active, *columns)

    def begin(self, model: Joinable, samples: int | None, total: int | None) -> float:
        """A backward of ``model`` begins on this rank; the weight of its gradients.

        Args:
            model: One of ``models``.
            samples: Samples of this rank inside ``model.batch()``; None outside.
            total: Samples of all ranks, as far as this one was told.

        Raises:
            MismatchError: ``total`` is not what all ranks have.
        """
        number = self._number_of(model)
        samples = NO_SAMPLES if samples is None else samples
        begun = self.announce(Operation.BEGIN, number, samples)
        if total is not None and total != sum(begun.samples):
            raise MismatchError(
                f"model.batch(local=, total=): the ranks hold {list(begun.samples)} samples, "
                f"{sum(begun.samples)} together, but this one was told total={total}"
            )
        return self.weight(begun)

    def finish(self, model: Joinable) -> None:
        """All gradients of that backward are there."""
        self.announce(Operation.FINISH, self._number_of(model))

    def weight(self, begun: Announced) -> float:
        """This rank's weight in the gradient of a backward that begins.

        Raises:
            MismatchError: Some ranks weight by samples, others do not.
        """
        rank, size = self.world.rank, self.world.size
        equal = {begun.samples[other] == NO_SAMPLES for other in begun.active}
        if len(equal) > 1:
            raise MismatchError(
                f"some ranks run backward inside model.batch(), others outside: the samples are "
                f"{list(begun.samples)} by rank ({NO_SAMPLES}: outside). Use it on all or none"
            )
        if equal == {False}:
            total = sum(begun.samples)
            return begun.samples[rank] / total if total else 0.0
        parts = [
            other in begun.active or bool(begun.holders[other] >> begun.subject & 1)
            for other in range(size)
        ]
        if not parts[rank]:
            return 0.0
        return 1 / (size if self._divide_by_world_size else sum(parts))

    def _number_of(self, model: Joinable) -> int:
        for number, known in enumerate(self.models):
            if known is model:
                return number
        raise ValueError(
            "a model that was not passed to mpiddl.join() runs backward inside it: ranks that "
            "have left would not take part. Pass all models: join(model, other)"
        )


def _different(rows: Sequence[Sequence[int]], one: int, other: int) -> MismatchError:
    said = [
        f"rank {rank}: {Operation(rows[rank][0]).name.lower()} {rows[rank][1]}"
        for rank in (one, other)
    ]
    return MismatchError(
        f"inside mpiddl.join() ranks are at different points ({said[0]}; {said[1]}). Each must "
        "run the same models, with no_sync() at the same steps; only the number of steps may differ"
    )


def announcements_of(world: World) -> Announcements | None:
    """The announcements of collectives of ``world``; None outside ``join``."""
    attendance = attendance_of(world)
    return attendance if isinstance(attendance, Announcements) else None


def all_gather_rows(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's float64 ``row``, one below the other; zeros from ranks that have left."""
    announcements = announcements_of(world)
    if announcements is not None:
        announcements.announce(Operation.ALL_GATHER, len(row))
    return all_gather(row.new_empty(world.size, len(row)), row, world=world)


def sum_up(row: torch.Tensor, world: World) -> torch.Tensor:
    """The sum of every rank's float64 ``row``, in place; ranks that have left add zeros."""
    announcements = announcements_of(world)
    if announcements is not None:
        announcements.announce(Operation.SUM, len(row))
    return all_reduce(row, world=world)
