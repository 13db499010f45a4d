"""mpiddl trains PyTorch models on MPI clusters.

    import mpiddl

    world = mpiddl.init()
    model = mpiddl.DataParallel(model)

Names are loaded when they are first used: importing mpiddl starts no MPI and no thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpiddl.base.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mpiddl import checkpoint as checkpoint
    from mpiddl import compress as compress
    from mpiddl import data as data
    from mpiddl import strategies as strategies
    from mpiddl.api.all_gather import all_gather as all_gather
    from mpiddl.api.all_reduce import all_reduce as all_reduce
    from mpiddl.api.all_to_all import all_to_all as all_to_all
    from mpiddl.api.barrier import barrier as barrier
    from mpiddl.api.broadcast import broadcast as broadcast
    from mpiddl.api.empty import empty as empty
    from mpiddl.api.gather import gather as gather
    from mpiddl.api.objects import broadcast_json as broadcast_json
    from mpiddl.api.objects import gather_json as gather_json
    from mpiddl.api.reduce import reduce as reduce
    from mpiddl.api.reduce_scatter import reduce_scatter as reduce_scatter
    from mpiddl.api.scatter import scatter as scatter
    from mpiddl.api.send_recv import recv as recv
    from mpiddl.api.send_recv import send as send
    from mpiddl.comm.world import World as World
    from mpiddl.comm.world import init as init
    from mpiddl.data.loading.seeds import seed as seed
    from mpiddl.data.shards.batches import ShardBatchSampler as ShardBatchSampler
    from mpiddl.data.shards.samplers import ShardSampler as ShardSampler
    from mpiddl.engine.work import Work as Work
    from mpiddl.errors import MpiddlError as MpiddlError
    from mpiddl.training import replicas as replicas
    from mpiddl.training.clipping import clip_grad_norm_ as clip_grad_norm_
    from mpiddl.training.data_parallel import DataParallel as DataParallel
    from mpiddl.training.join.join import join as join
    from mpiddl.training.late_step.overlapped_optimizer import (
        OverlappedOptimizer as OverlappedOptimizer,
    )
    from mpiddl.training.sync_batch_norm import SyncBatchNorm as SyncBatchNorm

_HOMES = {
    "DataParallel": "mpiddl.training.data_parallel",
    "MpiddlError": "mpiddl.errors",
    "OverlappedOptimizer": "mpiddl.training.late_step.overlapped_optimizer",
    "ShardBatchSampler": "mpiddl.data.shards.batches",
    "ShardSampler": "mpiddl.data.shards.samplers",
    "SyncBatchNorm": "mpiddl.training.sync_batch_norm",
    "Work": "mpiddl.engine.work",
    "World": "mpiddl.comm.world",
    "all_gather": "mpiddl.api.all_gather",
    "all_reduce": "mpiddl.api.all_reduce",
    "all_to_all": "mpiddl.api.all_to_all",
    "barrier": "mpiddl.api.barrier",
    "broadcast": "mpiddl.api.broadcast",
    "broadcast_json": "mpiddl.api.objects",
    "checkpoint": "mpiddl.checkpoint",
    "compress": "mpiddl.compress",
    "clip_grad_norm_": "mpiddl.training.clipping",
    "data": "mpiddl.data",
    "empty": "mpiddl.api.empty",
    "gather": "mpiddl.api.gather",
    "gather_json": "mpiddl.api.objects",
    "init": "mpiddl.comm.world",
    "join": "mpiddl.training.join.join",
    "recv": "mpiddl.api.send_recv",
    "reduce": "mpiddl.api.reduce",
    "reduce_scatter": "mpiddl.api.reduce_scatter",
    "replicas": "mpiddl.training.replicas",
    "scatter": "mpiddl.api.scatter",
    "seed": "mpiddl.data.loading.seeds",
    "strategies": "mpiddl.strategies",
    "send": "mpiddl.api.send_recv",
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
    "compress",
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
    "strategies",
]


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
