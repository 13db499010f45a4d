"""Sparse gradients, those of embeddings with ``sparse=True``, summed apart from the buckets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpiddl.collectives.channel import bytes_of
from mpiddl.comm.world import World
from mpiddl.engine.control import Control
from mpiddl.errors import GradientError

__all__ = ["SparseGradients", "sparse_weights"]

NO_GRADIENT = -1
"""Entries of a gradient that is None."""


def sparse_weights(module: torch.nn.Module) -> set[int]:
    """Identities of the parameters whose gradients will be sparse."""
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return {
        id(layer.weight) for layer in module.modules() if isinstance(layer, kinds) and layer.sparse
    }


class SparseGradients:
    """The parameters of a model with sparse gradients.

    At the end of a backward every rank gets the entries of all ranks, and adds them up in rank
    order: the same bits everywhere, coalesced. A rank without a gradient has no entries; where
    no rank has a gradient, ``grad`` stays None.

    Args:
        names: Names of these parameters, in the model's order.
        parameters: The parameters.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
        self.names = names
        self.parameters = parameters

    def refuse(self, member: int) -> None:
        """Raise GradientError if the gradient of ``member`` is not one of an embedding's."""
        gradient = self.parameters[member].grad
        if gradient is not None and (not gradient.is_sparse or gradient.sparse_dim() != 1):
            raise GradientError(
                f"the gradient of {self.names[member]!r}, an embedding's with sparse=True, is not "
                "sparse (used by another layer too? put there by hand?): make the embedding with "
                "sparse=False"
            )

    def reduce(self, weight: float, world: World, control: Control) -> None:
        """Make each gradient the weighted sum over all ranks. Collective.

        Args:
            weight: The weight of this rank's gradients.
            world: The ranks.
            control: Carries the entries.
        """
        for member in range(len(self.parameters)):
            self.refuse(member)
        mine = [_entries_of(parameter, weight) for parameter in self.parameters]
        lengths = [
            NO_GRADIENT if parameter.grad is None else len(values)
            for parameter, (_, values) in zip(self.parameters, mine, strict=True)
        ]
        # Lengths are exact in float64.
        table = torch.zeros(world.size, 1 + len(mine), dtype=torch.float64, device="cpu")
        table[world.rank] = torch.tensor([weight, *lengths], dtype=torch.float64)
        control.all_gather(list(table))
        weights, *counts = table.t().tolist()

        indices, values = [], []
        for (my_indices, my_values), of_ranks in zip(mine, counts, strict=True):
            indices.append(_parts(my_indices, of_ranks, world.rank))
            values.append(_parts(my_values, of_ranks, world.rank))
        control.all_gather(*([bytes_of(part) for part in parts] for parts in indices + values))
        for number, parameter in enumerate(self.parameters):
            if any(count != NO_GRADIENT for count in counts[number]):
                parameter.grad = _sum(parameter, indices[number], values[number], weights)


def _entries_of(parameter: torch.nn.Parameter, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of a gradient; none where it weighs nothing (and may be NaN)."""
    if parameter.grad is None or weight == 0:
        return parameter.new_empty(0, dtype=torch.int64), parameter.detach()[:0]
    gradient = parameter.grad.detach().coalesce()
    return gradient.indices()[0].contiguous(), gradient.values().contiguous()


def _parts(mine: torch.Tensor, counts: Sequence[float], rank: int) -> list[torch.Tensor]:
    """Room for what each rank has; this rank's is there already."""
    parts = [mine.new_empty(max(int(count), 0), *mine.shape[1:]) for count in counts]
    parts[rank] = mine
    return parts


def _sum(
    parameter: torch.nn.Parameter,
    indices: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    weights: Sequence[float],
) -> torch.Tensor:
    """The coalesced sum, rounded once: of 16-bit values in float32."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    weighted = [part.to(wide) * weight for part, weight in zip(values, weights, strict=True)]
    entries = torch.cat(list(indices)).unsqueeze(0), torch.cat(weighted)
    total = torch.sparse_coo_tensor(*entries, parameter.shape, check_invariants=False)
    return total.coalesce().to(parameter.dtype)
