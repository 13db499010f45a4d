"""One answer from the models of all ranks, where each rank has trained its own."""

from __future__ import annotations

import torch

from mpiddl.api.all_reduce import all_reduce
from mpiddl.api.arguments import describe_buffer
from mpiddl.api.fail_together import raise_together
from mpiddl.comm.world import World, current_world
from mpiddl.data.agreement import refuse_different
from mpiddl.data.signatures import checks_world

__all__ = ["ensemble"]

WAYS = ("mean", "vote")


@checks_world
def ensemble(
    outputs: torch.Tensor, world: World | None = None, *, how: str = "mean"
) -> torch.Tensor:
    """What the models of all ranks say together of the same samples. Collective.

    ``ensemble(...).argmax(1)`` are the predicted classes; of equal ones the smallest.

    Args:
        outputs: Of this rank's model, ``(n, classes)``; the same samples in the same order on every
            rank.
        world: The ranks; default those of ``mpiddl.init()``.
        how: ``mean``: the mean of what the models say, as it is passed; pass ``softmax(1)`` for
            models whose scores have different scales. ``vote``: each model has one vote for each
            sample, for the class of its highest score, of equal ones the smallest; the result is
            the part of the votes that each class got.

    Returns:
        float32, or float64 where ``outputs`` are; ``(n, classes)``, the same bits on every rank.

    Raises:
        DataError: On every rank: a model's outputs are NaN, or not floats of that shape, or those
            of ranks differ in shape, dtype or device.
    """
    world = world or current_world()
    raise_together(_problem(outputs, how), world)
    wide = torch.float64 if outputs.dtype == torch.float64 else torch.float32
    result = outputs.detach().to(wide).clone(memory_format=torch.contiguous_format)
    refuse_different("ensemble()", {"how": how, "outputs": describe_buffer(result)}, world)
    if how == "mean":
        return all_reduce(result, op="mean", world=world)
    votes = torch.zeros_like(result, dtype=torch.int32)
    votes.scatter_(1, result.argmax(1, keepdim=True), 1)
    return all_reduce(votes, world=world).to(wide) / world.size


def _problem(outputs: torch.Tensor, how: str) -> str | None:
    if how not in WAYS:
        return f"how={how!r} is none of {', '.join(WAYS)}"
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        return f"outputs must be a tensor of floats, got {describe_buffer(outputs)}"
    if outputs.dim() != 2 or outputs.shape[1] < 1:
        return f"outputs must have the shape (n, classes), got {tuple(outputs.shape)}"
    wrong = int(outputs.isnan().any(1).sum())
    if wrong:
        return f"the model's outputs are NaN for {wrong} of {len(outputs)} samples; leave it out"
    return None
