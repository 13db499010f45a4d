"""gloo, through torch.distributed, and torch's DistributedDataParallel on it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from mpiddl.bench.steps import Way, sgd

__all__ = ["Gloo", "connect"]

SETUP = timedelta(seconds=60)
OPS = {"sum": "SUM", "min": "MIN", "max": "MAX", "prod": "PRODUCT"}


class Gloo:
    """The processes find each other through a TCPStore on rank 0's node."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None

    def host(self, hosts: list[Any]) -> int:
        self._store = TCPStore(
            "0.0.0.0",  # noqa: S104 - ranks on other nodes come here
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=SETUP,
        )
        return int(self._store.port)

    def store_of(self, place: dict[str, Any]) -> TCPStore:
        """Through which the processes meet."""
        return self._store or TCPStore(
            place["address"], place["port"], is_master=False, timeout=SETUP
        )

    def join(self, place: dict[str, Any]) -> None:
        store = self.store_of(place)
        distributed.init_process_group(
            "gloo", store=store, rank=place["rank"], world_size=place["size"], timeout=SETUP
        )

    def barrier(self) -> None:
        distributed.barrier()

    def run(self, collective: str, source: torch.Tensor, target: torch.Tensor, op: str) -> None:
        if collective == "broadcast":
            distributed.broadcast(target, 0)
        elif collective == "all-gather":
            distributed.all_gather_into_tensor(target, source)
        elif collective == "all-to-all":
            distributed.all_to_all_single(target, source)
        elif op not in OPS:
            raise ValueError(f"it has no {op}")
        elif collective == "reduce-scatter":
            distributed.reduce_scatter_tensor(
                target, source, getattr(distributed.ReduceOp, OPS[op])
            )
        else:
            distributed.all_reduce(target, getattr(distributed.ReduceOp, OPS[op]))

    def parallel(self, model: torch.nn.Module, **options: Any) -> Way:
        """``bucket_size`` in bytes or None, torch's default; ``views``: gradients are views."""
        megabytes = options["bucket_size"] and options["bucket_size"] / (1 << 20)
        wrapped = DistributedDataParallel(
            model, bucket_cap_mb=megabytes, gradient_as_bucket_view=options["views"]
        )
        return Way(wrapped, sgd(model))


connect = Gloo
