"""mpiddl trains PyTorch models on MPI clusters.

    import mpiddl

    world = mpiddl.init()
    model = mpiddl.DataParallel(model)

Names are loaded when they are first used: importing mpiddl starts no MPI and no thread.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mpiddl import checkpoint as checkpoint
    from mpiddl import data as data
    from mpiddl.comm.world import World as World
    from mpiddl.comm.world import init as init
    from mpiddl.data.batches import ShardBatchSampler as ShardBatchSampler
    from mpiddl.data.samplers import ShardSampler as ShardSampler
    from mpiddl.data.seeds import seed as seed
    from mpiddl.errors import MpiddlError as MpiddlError
    from mpiddl.overlap.calls import all_reduce as all_reduce
    from mpiddl.overlap.calls import barrier as barrier
    from mpiddl.overlap.calls import broadcast as broadcast
    from mpiddl.overlap.calls import broadcast_json as broadcast_json
    from mpiddl.overlap.calls import gather_json as gather_json
    from mpiddl.overlap.exchange import all_gather as all_gather
    from mpiddl.overlap.exchange import all_to_all as all_to_all
    from mpiddl.overlap.memory import empty as empty
    from mpiddl.overlap.peers import recv as recv
    from mpiddl.overlap.peers import send as send
    from mpiddl.overlap.reductions import reduce as reduce
    from mpiddl.overlap.reductions import reduce_scatter as reduce_scatter
    from mpiddl.overlap.rooted import gather as gather
    from mpiddl.overlap.rooted import scatter as scatter
    from mpiddl.overlap.work import Work as Work
    from mpiddl.training import replicas as replicas
    from mpiddl.training.clipping import clip_grad_norm_ as clip_grad_norm_
    from mpiddl.training.data_parallel import DataParallel as DataParallel
    from mpiddl.training.join import join as join
    from mpiddl.training.overlapped_optimizer import OverlappedOptimizer as OverlappedOptimizer
    from mpiddl.training.sync_batch_norm import SyncBatchNorm as SyncBatchNorm

_HOMES = {
    "DataParallel": "mpiddl.training.data_parallel",
    "MpiddlError": "mpiddl.errors",
    "OverlappedOptimizer": "mpiddl.training.overlapped_optimizer",
    "ShardBatchSampler": "mpiddl.data.batches",
    "ShardSampler": "mpiddl.data.samplers",
    "SyncBatchNorm": "mpiddl.training.sync_batch_norm",
    "Work": "mpiddl.overlap.work",
    "World": "mpiddl.comm.world",
    "all_gather": "mpiddl.overlap.exchange",
    "all_reduce": "mpiddl.overlap.calls",
    "all_to_all": "mpiddl.overlap.exchange",
    "barrier": "mpiddl.overlap.calls",
    "broadcast": "mpiddl.overlap.calls",
    "broadcast_json": "mpiddl.overlap.calls",
    "checkpoint": "mpiddl.checkpoint",
    "clip_grad_norm_": "mpiddl.training.clipping",
    "data": "mpiddl.data",
    "empty": "mpiddl.overlap.memory",
    "gather": "mpiddl.overlap.rooted",
    "gather_json": "mpiddl.overlap.calls",
    "init": "mpiddl.comm.world",
    "join": "mpiddl.training.join",
    "recv": "mpiddl.overlap.peers",
    "reduce": "mpiddl.overlap.reductions",
    "reduce_scatter": "mpiddl.overlap.reductions",
    "replicas": "mpiddl.training.replicas",
    "scatter": "mpiddl.overlap.rooted",
    "seed": "mpiddl.data.seeds",
    "send": "mpiddl.overlap.peers",
}

__all__ = [
    "DataParallel",
    "MpiddlError",
    "OverlappedOptimizer",
    "ShardBatchSampler",
    "ShardSampler",
    "SyncBatchNorm",
    "Work",
    "World",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_json",
    "checkpoint",
    "clip_grad_norm_",
    "data",
    "empty",
    "gather",
    "gather_json",
    "init",
    "join",
    "recv",
    "reduce",
    "reduce_scatter",
    "replicas",
    "scatter",
    "seed",
    "send",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpiddl' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = getattr(home, name, home)  # `replicas` is a module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
