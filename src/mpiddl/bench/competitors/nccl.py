"""torch's DistributedDataParallel on NCCL: what trains on GPUs today, one rank on each."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from mpiddl.bench.competitors.gloo import SETUP, Gloo

__all__ = ["Nccl", "connect"]


class Nccl(Gloo):
    """As gloo, whose store the processes find each other through too."""

    def join(self, place: dict[str, Any]) -> None:
        distributed.init_process_group(
            "nccl",
            store=self.store_of(place),
            rank=place["rank"],
            world_size=place["size"],
            timeout=SETUP,
            device_id=torch.device(place["device"]),
        )


connect = Nccl
