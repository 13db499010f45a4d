"""Which ranks take part in a backward, and what the gradients of each of them weigh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World
from mpiddl.errors import MismatchError
from mpiddl.gradients.agreement import who_has_what

__all__ = ["Attendance", "attend", "attendance_of", "check_share", "refuse_left_out"]


class Attendance(Protocol):
    """Which ranks take part in the backwards of models on one world.

    Attributes:
        complete: All ranks take part in all of them.
        root: A rank that takes part, the same on every rank; its buffers are everyone's.
    """

    complete: bool
    root: int

    def begin(self, model: Any, samples: int | None, total: int | None) -> float:
        """A backward of ``model`` begins on this rank; returns the weight of its gradients here.

        Args:
            model: The replica whose backward it is.
            samples: Samples of this rank inside ``model.batch()``; None outside.
            total: Samples of all ranks, as far as this rank was told.
        """
        ...

    def finish(self, model: Any) -> None:
        """All gradients of that backward are there."""
        ...


class _Everyone:
    """All ranks take part in every backward."""

    complete = True
    root = 0

    def __init__(self, world: World) -> None:
        self._size = world.size

    def begin(self, model: Any, samples: int | None, total: int | None) -> float:
        return 1 / self._size if samples is None or total is None else samples / total

    def finish(self, model: Any) -> None:
        pass


class _Present:
    """The attendance of one world at the moment."""

    def __init__(self, world: World) -> None:
        self.attendance: Attendance = _Everyone(world)


def attendance_of(world: World) -> Attendance:
    """Which ranks of ``world`` take part in the backward that begins."""
    return world.service(_Present).attendance


def attend(world: World, attendance: Attendance | None) -> None:
    """Other ranks take part from now on; None: all do."""
    world.service(_Present).attendance = attendance or _Everyone(world)


def check_share(local: int, total: int | None, world: World) -> None:
    """Refuse ``local`` of ``total`` samples where that cannot be.

    Raises:
        ValueError: On this rank's own account.
        MismatchError: With MPIDDL_CHECK=1: the parts of all ranks do not add up to ``total``.
    """
    compares = not attendance_of(world).complete  # at the begin of the backward
    if total is None and not compares:
        raise ValueError(
            "model.batch() needs total=, the samples of all ranks together; only inside "
            "mpiddl.join() is it known without"
        )
    if local < 0 or (total is not None and (local > total or total == 0)):
        raise ValueError(f"expected 0 <= local <= total and total > 0, got {local} of {total}")
    if world.settings.check and not compares:
        # Weights that do not sum to one scale the gradient, and nothing else would tell.
        shares = gather_json([local, total], world=world)
        summed = sum(part for part, _ in shares)
        if any(claimed != summed for _, claimed in shares):
            raise MismatchError(
                f"model.batch(local=, total=): the ranks hold {[part for part, _ in shares]} "
                f"samples, {summed} together, but were told "
                f"total={[claimed for _, claimed in shares]}"
            )


def refuse_left_out(forwards: Sequence[int | None]) -> None:
    """Stop on every rank if one has left out a backward that others ran.

    Args:
        forwards: By rank, the number of forwards in training since its last backward; None of a
            rank without samples.

    Raises:
        MismatchError: They are not equal.
    """
    counts = [count for count in forwards if count is not None]
    if len(set(counts)) > 1:
        raise MismatchError(
            "the ranks are at different steps. Forwards in training since the last backward: "
            f"{who_has_what(forwards)}. A rank must not leave out a backward that others run, "
            "where its loss is NaN, say: its next one would be added to theirs of another step. "
            "Let it take part with model.batch(local=0, total=...), or decide on all ranks "
            'together, mpiddl.all_reduce(fine, op="min"). (Forwards that are not trained belong '
            "under torch.no_grad().)"
        )
