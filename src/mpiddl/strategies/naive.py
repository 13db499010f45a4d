"""Each gradient is averaged alone, after backward: slow, and obviously right."""

from __future__ import annotations

import torch

from mpiddl.api.all_reduce import all_reduce
from mpiddl.strategies.base import Strategy

__all__ = ["Naive"]


class Naive(Strategy):
    """What ``Synchronous`` computes, without its buckets and its overlap."""

    def backward_ended(self) -> None:
        weight, world = self.replica.weight, self.replica.world
        for _, parameter in self.replica.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dense = parameter.grad.to_dense().contiguous()
            all_reduce(dense, pre_scale=weight, world=world)
            parameter.grad = dense
