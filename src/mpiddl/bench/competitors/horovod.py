"""Horovod, with its gloo controller: MPI belongs to the rank beside it."""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple

import torch

from mpiddl.bench.steps import Way, sgd

__all__ = ["Horovod", "connect"]

OPS = {"sum": "Sum", "mean": "Average", "min": "Min", "max": "Max", "prod": "Product"}


class _Slot(NamedTuple):
    """A rank as Horovod's rendezvous server wants it described."""

    hostname: str
    local_rank: int
    local_size: int
    size: int
    cross_size: int


class Horovod:
    """``horovod.torch``; the processes find each other through Horovod's own server."""

    def host(self, hosts: list[Any]) -> int:
        server = importlib.import_module("horovod.runner.http.http_server")
        self._rendezvous = server.RendezvousServer()
        port = self._rendezvous.start()
        nodes = len({hostname for hostname, _, _ in hosts})
        self._rendezvous.init(
            [_Slot(name, rank, size, len(hosts), nodes) for name, rank, size in hosts]
        )
        return int(port)

    def join(self, place: dict[str, Any]) -> None:
        settings = {
            "CONTROLLER": "gloo",
            "CPU_OPERATIONS": "gloo",
            "GLOO_RENDEZVOUS_ADDR": place["address"],
            "GLOO_RENDEZVOUS_PORT": place["port"],
            "GLOO_IFACE": os.environ.get("GLOO_SOCKET_IFNAME", ""),
            "HOSTNAME": os.uname().nodename,
            "RANK": place["rank"],
            "SIZE": place["size"],
            "LOCAL_RANK": place["local_rank"],
            "LOCAL_SIZE": place["local_size"],
            "CROSS_RANK": place["node_rank"],
            "CROSS_SIZE": place["num_nodes"],
        }
        os.environ.update({f"HOROVOD_{name}": str(value) for name, value in settings.items()})
        self._horovod: Any = importlib.import_module("horovod.torch")
        self._horovod.init()

    def barrier(self) -> None:
        self._horovod.barrier()

    def run(self, collective: str, source: torch.Tensor, target: torch.Tensor, op: str) -> None:
        horovod, operation = self._horovod, OPS[op]
        # A fixed name, as a gradient has one: Horovod then answers from its cache.
        if collective == "all-reduce":
            horovod.allreduce_(target, name=collective, op=getattr(horovod, operation))
        elif collective == "broadcast":
            horovod.broadcast_(target, 0, name=collective)
        elif collective == "all-gather":  # this and the next two have no output argument
            target.copy_(horovod.allgather(source, name=collective))
        elif collective == "reduce-scatter":
            reduced = horovod.reducescatter(source, name=collective, op=getattr(horovod, operation))
            target.copy_(reduced)
        else:
            target.copy_(horovod.alltoall(source, name=collective))

    def parallel(self, model: torch.nn.Module, **_options: Any) -> Way:
        """Its optimizer waits for the gradients, so there is nothing to do after backward."""
        named = list(model.named_parameters())
        optimizer = self._horovod.DistributedOptimizer(sgd(model), named_parameters=named)
        return Way(model, optimizer)


connect = Horovod
