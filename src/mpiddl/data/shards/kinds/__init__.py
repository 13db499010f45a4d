"""Ways to deal samples out to ranks: one file each, all behind one small interface.

A new one is a file here, a line in ``SHARDINGS``, and a test parameter.
"""

from __future__ import annotations

import inspect
from typing import Any

from mpiddl.data.shards.kinds.balanced import Balanced
from mpiddl.data.shards.kinds.base import Sharding
from mpiddl.data.shards.kinds.contiguous import Contiguous
from mpiddl.data.shards.kinds.grouped import Grouped
from mpiddl.data.shards.kinds.hashed import Hashed
from mpiddl.data.shards.kinds.random import Random
from mpiddl.data.shards.kinds.stratified import Stratified
from mpiddl.data.shards.kinds.strided import Strided
from mpiddl.data.shards.kinds.weighted import Weighted
from mpiddl.errors import DataError

__all__ = ["SHARDINGS", "Sharding", "sharding"]

SHARDINGS: dict[str, type[Any]] = {
    "contiguous": Contiguous,
    "strided": Strided,
    "random": Random,
    "hash": Hashed,
    "stratified": Stratified,
    "weighted": Weighted,
    "balanced": Balanced,
    "grouped": Grouped,
}


def sharding(name: str, length: int, **options: Any) -> Sharding:
    """A way to deal ``length`` samples out to ranks.

    Args:
        name: ``contiguous``, ``strided``, ``random``, ``hash``, ``stratified``, ``weighted``,
            ``balanced`` or ``grouped``.
        length: Samples of the data set.
        options: What that one takes: ``seed``, ``labels``, ``keys``, ``groups``, ``weights``,
            ``draws``. Those that are None count as not given; a ``seed`` that it has no use for
            is left aside.

    Raises:
        DataError: An unknown name, an option that it does not take, one that it needs, or values
            that do not fit the samples.
    """
    if name not in SHARDINGS:
        raise DataError(f"{name!r} is no sharding; choose from {', '.join(SHARDINGS)}")
    known = inspect.signature(SHARDINGS[name]).parameters
    given = {key: value for key, value in options.items() if value is not None}
    if "seed" not in known:
        given.pop("seed", None)
    for key in given:
        if key not in known:
            raise DataError(f"{name} sharding takes no {key}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in {"length", *given}:
            raise DataError(f"{name} sharding needs {key}=...")
    made: Sharding = SHARDINGS[name](length, **given)
    return made
