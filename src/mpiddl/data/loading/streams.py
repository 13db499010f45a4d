"""Samples that come one after another: each goes to one rank, and to one of its loader workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mpiddl.comm.world import World, current_world
from mpiddl.data.loading.undivided import undivided
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError

__all__ = ["ShardedStream"]

T = TypeVar("T")

# What the main process tells its loader workers, in memory that they share: the epoch, and for an
# epoch that goes on in its middle the batches that were taken, their size, the number of workers,
# and how many items a worker must lack to lack a batch. Last, which workers have gone on.
_EPOCH, _BATCHES, _BATCH_SIZE, _WORKERS, _SHORTAGE, _GONE_ON = range(6)
_MOST_WORKERS = 1024  # of one rank
_LOADER = ("taken", "batch_size", "workers", "drop_last")  # what a state says of the loader


class ShardedStream(IterableDataset[T]):
    """A stream whose items are dealt out over ranks and their loader workers, each item once.

    Item i goes to rank ``i % size``, whatever number of workers each rank has. So one rank may get
    an item more than another, and their numbers of batches may differ: train under
    ``mpiddl.join``. Every worker passes over the items of the others; where that is slow, deal
    whole files: ``ShardedStream.of_files``.

    A source that would divide itself among ranks or loader workers is kept from it: while it is
    read, it finds a single process. So nothing is divided twice.

    Args:
        source: What can be iterated over again and again, or a function that returns an iterator;
            it must give the same items in the same order on every rank. Loader workers need a
            function that is defined at the top of a module.
        world: The ranks; default those of ``mpiddl.init()``.
        shuffle_buffer: Items that are held back to be shuffled, in every worker; 0 leaves the order
            as it is. More mix better and take more memory.
        seed: Of the shuffle.

    Raises:
        DataError: ``source`` can be iterated over only once.
        ValueError: ``shuffle_buffer`` or ``seed`` is negative.
    """

    @checks_world
    def __init__(
        self,
        source: Iterable[T] | Callable[[], Iterable[T]],
        world: World | None = None,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> None:
        if shuffle_buffer < 0 or seed < 0:
            raise ValueError(
                f"shuffle_buffer and seed must not be negative, got {shuffle_buffer} and {seed}"
            )
        if isinstance(source, Iterator):
            raise DataError(
                "the source can be read only once; pass a function that returns a fresh iterator"
            )
        world = world or current_world()
        self.rank, self.size = world.rank, world.size
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self._source = source
        told = torch.zeros(_GONE_ON + _MOST_WORKERS, dtype=torch.int64, device="cpu")
        # For workers that live longer than an epoch.
        self._told = told.share_memory_()  # type: ignore[no-untyped-call]

    @staticmethod
    @checks_world
    def of_files(
        paths: Iterable[str | os.PathLike[str]],
        read: Callable[[str], Iterable[T]],
        world: World | None = None,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> ShardedStream[T]:
        """A stream of the items in files, in which whole files are dealt out.

        Every worker opens its own files only. Ranks get as many items as their files hold.

        Args:
            paths: The same files on every rank. They are sorted, for ``glob`` finds them in any
                order; with a shuffle buffer, files are dealt out anew every epoch.
            read: Called with a path, returns the items in that file.
            world: The ranks; default those of ``mpiddl.init()``.
            shuffle_buffer: Items that are held back to be shuffled, in every worker.
            seed: Of the shuffle; the same on every rank.

        Raises:
            DataError: When it is read: there are fewer files than loader workers.
        """
        files = sorted(os.fspath(path) for path in paths)
        return _FileStream(files, read, world, shuffle_buffer=shuffle_buffer, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming epoch; workers that live on hear of it, too.

        Raises:
            ValueError: ``epoch`` is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if epoch != self._epoch:
            self._told.zero_()
            self._told[_EPOCH] = epoch

    def __iter__(self) -> Iterator[T]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        skip = 0
        if self._told[_WORKERS] > 0:
            worker, skip = self._go_on(worker, workers)
        random = numpy.random.default_rng([self.seed, self._epoch, self.rank, worker])
        share = undivided(lambda: self._share(worker, workers))
        items = self._shuffled(share, random)
        return self._without(skip, items)

    def _share(self, worker: int, workers: int) -> Iterable[T]:
        """This worker's items. Ranks take turns before workers do: ranks' shares are even."""
        items = self._source() if callable(self._source) else self._source
        return islice(items, worker * self.size + self.rank, None, workers * self.size)

    def _shuffled(self, items: Iterator[T], random: numpy.random.Generator) -> Iterator[T]:
        """The items, each in the place of one that was held back."""
        held = list(islice(items, self.shuffle_buffer))
        if self.shuffle_buffer:
            for item in items:
                place = random.integers(len(held))
                yield held[place]
                held[place] = item
            yield from (held[place] for place in random.permutation(len(held)))
        else:
            yield from items

    @property
    def _epoch(self) -> int:
        return int(self._told[_EPOCH])

    def state_dict(self, taken: int, loader: DataLoader[Any] | None = None) -> dict[str, int]:
        """Where this rank is in the epoch; each rank saves its own.

        Args:
            taken: Batches of ``loader`` that this loop has taken (workers read ahead, so only the
                loop knows), counted from 0 again where an epoch goes on; without loader, items of
                the stream.
            loader: Which reads this stream.

        Raises:
            DataError: The epoch went on in its middle, and the loader has another batch size or
                number of workers than the one before.
        """
        counted = {
            "batch_size": 1 if loader is None else loader.batch_size or 1,
            "workers": 1 if loader is None else max(1, loader.num_workers),
        }
        before = 0
        if self._told[_WORKERS] > 0:
            was = {"batch_size": self._told[_BATCH_SIZE], "workers": self._told[_WORKERS]}
            _refuse_others({name: int(value) for name, value in was.items()}, counted)
            before = int(self._told[_BATCHES])
        return {
            **self._layout(),
            **counted,
            "epoch": self._epoch,
            "taken": before + taken,  # since the epoch began
            "drop_last": 0 if loader is None else int(loader.drop_last),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on where the state was taken, with the same items in the same order.

        What was taken is read again and left out. Call ``set_epoch`` before the pass after that.

        Raises:
            DataError: The state is of another rank, world size, seed or buffer. When the stream is
                read: the loader has another number of workers than the one before.
        """
        layout = self._layout()
        if not layout.keys() | {"epoch", *_LOADER} <= state.keys():
            raise DataError("this is no state of a ShardedStream; pass what state_dict returned")
        _refuse_others({name: state[name] for name in layout}, layout)
        self._told.zero_()
        self._told[_EPOCH] = state["epoch"]
        self._told[_BATCHES] = state["taken"]
        self._told[_BATCH_SIZE] = state["batch_size"]
        self._told[_WORKERS] = state["workers"]
        self._told[_SHORTAGE] = 1 if state["drop_last"] else state["batch_size"]

    def _layout(self) -> dict[str, int]:
        return {
            "rank": self.rank,
            "size": self.size,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
        }

    def _go_on(self, worker: int, workers: int) -> tuple[int, int]:
        """Whose items this worker takes over in an epoch's middle, and how many it leaves out.

        Loaders take their workers' batches in turn. The worker whose turn it is becomes the first.
        """
        _refuse_others({"workers": int(self._told[_WORKERS])}, {"workers": workers})
        if self._told[_GONE_ON + worker] > 0:
            raise DataError(
                f"epoch {self._epoch} went on in its middle, and is over; call set_epoch before "
                "every pass"
            )
        self._told[_GONE_ON + worker] = 1
        batches = int(self._told[_BATCHES])
        turn = (worker + batches) % workers
        return turn, -((turn - batches) // workers) * int(self._told[_BATCH_SIZE])

    def _without(self, skip: int, items: Iterator[T]) -> Iterator[T]:
        """The items but for the first ``skip``."""
        left_out = sum(1 for _ in islice(items, skip))
        if skip and skip - left_out >= self._told[_SHORTAGE]:
            raise DataError(
                "the epoch cannot go on: so near its end, with some workers' files read, it cannot "
                "be told which batches were taken; start the next epoch"
            )
        yield from items


def _refuse_others(was: dict[str, int], now: dict[str, int]) -> None:
    differing = [name for name in now if was[name] != now[name]]
    if differing:
        saved, here = (
            ", ".join(f"{name} {values[name]}" for name in differing) for values in (was, now)
        )
        raise DataError(
            f"the stream's state was saved with {saved}, but this is {here}; go on with the same "
            "ranks, workers and settings, or start the epoch again"
        )


class _FileStream(ShardedStream[T]):
    """Deals out files."""

    def __init__(
        self,
        files: Sequence[str],
        read: Callable[[str], Iterable[T]],
        world: World | None,
        **options: Any,
    ) -> None:
        super().__init__((), world, **options)
        self.files = files
        self._read = read

    def _share(self, worker: int, workers: int) -> Iterable[T]:
        slots = workers * self.size
        if len(self.files) < slots:
            raise DataError(
                f"{len(self.files)} files for {slots} readers ({self.size} ranks, {workers} loader "
                "workers each): some would get none; use fewer workers, split the files, or deal "
                "out their items with ShardedStream(...)"
            )
        files: Iterable[str] = self.files
        if self.shuffle_buffer:
            order = numpy.random.default_rng([self.seed, self._epoch]).permutation(len(self.files))
            files = [self.files[place] for place in order]
        mine = islice(files, worker * self.size + self.rank, None, slots)
        return chain.from_iterable(map(self._read, mine))
