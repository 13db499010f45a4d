"""What a rank's gradients weigh, where ranks hold different numbers of samples."""

from __future__ import annotations

from collections.abc import Sequence

from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World
from mpiddl.errors import MismatchError
from mpiddl.gradients.agreement import who_has_what
from mpiddl.training.join.announcements import Joinable, announcements_of

__all__ = ["check_share", "refuse_left_out", "weight_of_backward"]


def check_share(local: int, total: int | None, world: World) -> None:
    """Refuse ``local`` of ``total`` samples where that cannot be.

    Raises:
        ValueError: On this rank's own account.
        MismatchError: With MPIDDL_CHECK=1: the parts of all ranks do not add up to ``total``.
    """
    joined = announcements_of(world) is not None  # then the begin of backward compares
    if total is None and not joined:
        raise ValueError(
            "model.batch() needs total=, the samples of all ranks together; only inside "
            "mpiddl.join() is it known without"
        )
    if local < 0 or (total is not None and (local > total or total == 0)):
        raise ValueError(f"expected 0 <= local <= total and total > 0, got {local} of {total}")
    if world.settings.check and not joined:
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
        forwards: By rank, those in training since its last backward; None without samples.

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


def weight_of_backward(model: Joinable, samples: int | None, total: int | None) -> float:
    """This rank's weight in the sum of gradients of a backward that begins on it.

    Args:
        model: Whose backward.
        samples: Of this rank, inside ``model.batch()``.
        total: Of all ranks, as far as this one was told.
    """
    joined = announcements_of(model.world)
    if joined is not None:
        return joined.begin(model, samples, total)
    if samples is None or total is None:
        return 1 / model.world.size
    return samples / total
