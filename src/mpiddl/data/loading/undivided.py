"""Reads a source as if this were the only process, so that it does not divide itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data._utils import worker as loader_worker

__all__ = ["undivided"]

T = TypeVar("T")

# What libraries ask for their share: torchrun's names, and those that webdataset adds.
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "WORKER": "0", "NUM_WORKERS": "1"}
_END: Any = object()


def undivided(items: Callable[[], Iterable[T]]) -> Iterator[T]:
    """The items of ``items()``, whose code finds neither other ranks nor other loader workers.

    Many data sets (those of datasets, webdataset, and most IterableDatasets) leave out what they
    think is another worker's or rank's. Who deals out their items must see all of them.
    """
    with _OneProcess():
        return _rest(iter(items()))


def _rest(iterator: Iterator[T]) -> Iterator[T]:
    while True:
        with _OneProcess():
            item = next(iterator, _END)
        if item is _END:
            return
        yield item


class _OneProcess:
    """Hides the loader's worker, and the rank in variables that are set. Nests."""

    def __enter__(self) -> None:
        self._info = loader_worker._worker_info
        loader_worker._worker_info = None
        # Others are not added: C libraries may be reading the environment in another thread, which
        # is safe only as long as no variable comes or goes.
        self._variables = {name: os.environ[name] for name in _ALONE if name in os.environ}
        for name in self._variables:
            os.environ[name] = _ALONE[name]

    def __exit__(self, *_: object) -> None:
        loader_worker._worker_info = self._info
        os.environ.update(self._variables)
