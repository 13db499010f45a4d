"""torch's DataLoader, set up for a rank of an MPI job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from functools import cache, partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mpiddl.base.log import logger
from mpiddl.comm.world import current_world, is_running
from mpiddl.data.loading.streams import ShardedStream
from mpiddl.data.signatures import checks_world
from mpiddl.launch.offers import offered

__all__ = ["loader"]


@checks_world
def loader(
    dataset: Dataset[Any],
    *,
    batches: Iterable[list[int]] | None = None,
    sampler: Iterable[int] | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    **options: Any,
) -> DataLoader[Any]:
    """A DataLoader whose workers do not disturb MPI.

        batches = mpiddl.ShardBatchSampler(dataset, world, batch_size=256)
        train = mpiddl.data.loader(dataset, batches=batches, num_workers=4)
        test = mpiddl.data.loader(tests, sampler=mpiddl.ShardSampler(tests, world), batch_size=256)

    Workers come from a fork server, never from a fork of the rank, which could break its MPI; they
    live for all epochs. With workers, a script starts under ``if __name__ == "__main__":``, and
    data set and functions are defined at the top of a module. On GPUs, batches are put into pinned
    memory.

    Args:
        dataset: The samples. A stream that is no ``ShardedStream`` must divide itself among ranks.
        batches: This rank's batches, such as a ``ShardBatchSampler``; its ``collate``, if it has
            one, makes batches of samples.
        sampler: This rank's samples, such as a ``ShardSampler``; ``range(len(dataset))`` for all.
        batch_size: Samples per batch of *this rank*, with a sampler; with a stream, None leaves
            its items as they are.
        num_workers: Processes of this rank that read ahead; 0 reads in the rank itself.
        options: More of DataLoader's.

    Raises:
        ValueError: The arguments contradict each other, or would fork the rank.
    """
    stream = isinstance(dataset, IterableDataset)
    if stream and not isinstance(dataset, ShardedStream):
        _hint_at_ranks()
    _check_order(stream, batches, sampler, batch_size, options)
    if num_workers > 0:
        context = options.setdefault("multiprocessing_context", "forkserver")
        _check_context(context)
        _check_names(dataset, options)
        options.setdefault("persistent_workers", True)
        options["worker_init_fn"] = partial(_start_worker, options.get("worker_init_fn"), offered())
        # torch is imported once, by the server, and not again by each worker.
        multiprocessing.set_forkserver_preload([__name__])
        _start_server_deaf()
    # Its workers' seeds are not drawn from the rank's own random numbers: what a model draws
    # after a job went on in mid-epoch must not depend on how often a loader was started.
    if "generator" not in options:
        device = torch.empty(()).device  # where torch draws them
        options["generator"] = torch.Generator(device).manual_seed(torch.initial_seed())
    options.setdefault("pin_memory", is_running() and current_world().on_gpu)
    if batches is not None:
        if hasattr(batches, "collate"):
            options.setdefault("collate_fn", batches.collate)
        options["batch_sampler"] = batches
    else:
        options |= {"batch_size": batch_size, "sampler": sampler}
    return DataLoader(dataset, num_workers=num_workers, **options)


def _hint_at_ranks() -> None:
    """On rank 0, where a stream that asks for its rank in torchrun's way would find none."""
    if not is_running() or current_world().size == 1 or current_world().rank > 0:
        return
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _hint()


@cache
def _hint() -> None:
    """Once is enough."""
    logger.warning(
        "a stream that divides itself by RANK and WORLD_SIZE finds neither here, and every rank "
        "reads all of it: give it world.rank and world.size, or wrap it in "
        "mpiddl.data.ShardedStream(stream, world)"
    )


def _check_order(
    stream: bool, batches: object, sampler: object, batch_size: object, options: dict[str, Any]
) -> None:
    """Exactly one argument says which samples this rank reads."""
    if options.get("batch_sampler") is not None:
        raise ValueError("pass the batch sampler as batches=")
    given = {"batches": batches, "sampler": sampler}
    chosen = [name for name, value in given.items() if value is not None]
    if stream and (chosen or options.get("shuffle")):
        raise ValueError(
            f"a stream has an order of its own: leave out {(*chosen, 'shuffle')[0]}=, and let the "
            "stream shuffle (ShardedStream(..., shuffle_buffer=...))"
        )
    if len(chosen) == 2:
        raise ValueError("pass batches= or sampler=, not both")
    if options.get("shuffle") and not stream:
        raise ValueError("shuffle=True makes no shares: pass shuffle=True to the sampler instead")
    if not stream and not chosen:
        raise ValueError(
            "which samples are this rank's? Pass batches=mpiddl.ShardBatchSampler(...) to train, "
            "sampler=mpiddl.ShardSampler(...) to evaluate, or sampler=range(len(dataset)) for all "
            "samples on every rank"
        )
    if batches is not None and (batch_size is not None or options.get("drop_last")):
        raise ValueError("batches= says how large batches are: leave out batch_size and drop_last")
    if sampler is not None and batch_size is None:
        raise ValueError("batch_size is missing: samples per batch of this rank")


def _check_context(context: str | BaseContext) -> None:
    name = context if isinstance(context, str) else context.get_start_method()
    if name == "fork":
        raise ValueError(
            "a fork of a rank can break its MPI (and CUDA): leave out multiprocessing_context, or "
            "pass 'forkserver' or 'spawn'"
        )


def _check_names(dataset: Dataset[Any], options: dict[str, Any]) -> None:
    """What workers are sent must have a name at the top of a module."""
    parts = {"the data set": dataset, **options}
    # Since Python 3.11 every object has a __getstate__.
    if getattr(type(dataset), "__getstate__", None) is getattr(object, "__getstate__", None):
        parts |= {f"the data set's {name}": value for name, value in vars(dataset).items()}
    for what, part in parts.items():
        name = getattr(part, "__qualname__", type(part).__qualname__)
        if "<locals>" in name or "<lambda>" in name:
            raise ValueError(
                f"{what} is {name}, which loader workers cannot find: define it at the top of a "
                "module, or use num_workers=0"
            )


def _start_server_deaf() -> None:
    """Start what workers come from, deaf to SIGUSR1, which they inherit.

    Launchers send it to all processes of a rank, and it is meant for the rank: to save and leave.
    It ends who is not prepared for it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(
    then: Callable[[int], object] | None, variables: dict[str, str], number: int
) -> None:
    """Lets a worker know its rank, and end with it, however that ends.

    torch's workers watch their parent, here the fork server. That lives as long as one of them
    does, so they would outlive a rank that is killed, and keep its launcher waiting. A fork server
    that was started before ``mpiddl.init()`` has an older environment.
    """
    os.environ.update(variables)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank, daemon=True).start()
    if then is not None:
        then(number)


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    if rank is not None:
        rank.join()
        os._exit(1)
