"""Results of all ranks in one place: predictions in the data set's order, and plain tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from mpiddl.api.all_gather import all_gather
from mpiddl.api.arguments import check_root
from mpiddl.api.fail_together import raise_together
from mpiddl.api.gather import gather
from mpiddl.api.objects import gather_json
from mpiddl.collectives.channel import bytes_of
from mpiddl.comm.world import World, current_world
from mpiddl.data.agreement import refuse_different
from mpiddl.data.signatures import checks_world
from mpiddl.errors import DataError
from mpiddl.gradients.agreement import odd_ones, who_has_what

__all__ = ["gather_predictions", "gather_tensors"]

MOST_NAMED = 5
"""Samples that an error names."""


@checks_world
def gather_predictions(
    indices: Sequence[int] | NDArray[Any] | torch.Tensor,
    predictions: NDArray[Any] | torch.Tensor,
    length: int,
    world: World | None = None,
    *,
    root: int | None = None,
) -> Any:
    """One row for each sample of the data set, in its order, from what every rank has. Collective.

    Args:
        indices: The samples of this rank, in any order, ``(n,)``.
        predictions: Their rows, ``(n, ...)``: a tensor, on any device, or an array of numbers. A
            rank without samples may pass any empty one.
        length: Samples of the data set.
        world: The ranks; default those of ``mpiddl.init()``.
        root: The rank that gets the result (the others get None); default every rank.

    Returns:
        A tensor on the host, or an array where arrays were passed. Shape: (length, ...).

    Raises:
        DataError: On every rank: a sample is missing, came twice or is not in the data set, rows of
            ranks differ in dtype or shape, or ``length`` or ``root`` does.
    """
    world = world or current_world()
    problem = None
    try:
        length = operator.index(length)
        places, rows = _checked(indices, predictions, length)
        if root is not None:
            check_root(root, world)
        kind = [str(rows.dtype), list(rows.shape[1:]), isinstance(predictions, numpy.ndarray)]
    except (ValueError, TypeError, RuntimeError) as error:
        problem = str(error)
    raise_together(problem, world)
    refuse_different("gather_predictions()", {"length": length, "root": root}, world)
    facts = gather_json([len(rows), kind], world=world)
    counts = [count for count, _ in facts]
    name, shape, as_array = _same_kind(facts)
    result = torch.empty(length, *shape, dtype=_dtype(name), device="cpu")
    everyones = torch.empty(sum(counts), dtype=torch.int64, device="cpu")
    all_gather(everyones, places, lengths=counts, world=world)
    _check_once(everyones.numpy(), counts, length)
    nbytes = result.nbytes // length  # of a row
    received = _gather_bytes(rows, [count * nbytes for count in counts], root, world)
    if received is None:
        return None
    result[everyones] = received.view(result.dtype).view(result.shape)
    return result.numpy() if as_array else result


@checks_world
def gather_tensors(
    tensor: torch.Tensor, world: World | None = None, *, group: World | None = None
) -> list[torch.Tensor]:
    """Every rank's tensor, in rank order, on every rank; shapes may differ. Collective.

    It is what torchmetrics calls a ``dist_sync_fn``, so that its metrics work on MPI ranks:

        torchmetrics.AUROC("binary", dist_sync_fn=mpiddl.data.gather_tensors,
                           distributed_available_fn=lambda: True)

    Args:
        tensor: Any dtype, shape and device.
        world: The ranks; default those of ``mpiddl.init()``.
        group: The same, by the name that torchmetrics uses.

    Returns:
        New tensors on the device of ``tensor``. A rank that has nothing, an empty tensor of one
        dimension, is given the dtype and shape of one that has something.

    Raises:
        DataError: On every rank, if one passed no dense tensor.
    """
    world = world or group or current_world()
    problem, place = None, getattr(tensor, "device", "cpu")
    try:
        mine = _on_host(tensor)
    except (ValueError, TypeError, RuntimeError) as error:
        problem = str(error)
    raise_together(problem, world)
    facts = gather_json([str(mine.dtype), list(mine.shape), mine.nbytes], world=world)
    received = _gather_bytes(mine, [nbytes for *_, nbytes in facts], None, world)
    assert received is not None
    full = next((fact for fact in facts if fact[1] != [0]), facts[0])
    parts = torch.split(received, [nbytes for *_, nbytes in facts])
    result = []
    for part, (dtype, shape, _) in zip(parts, facts, strict=True):
        if shape == [0]:
            dtype, shape = full[0], [0, *full[1][1:]]
        # A part may begin where its dtype cannot: copied, it begins anew.
        result.append(part.clone().view(_dtype(dtype)).view(shape).to(place))
    return result


def _checked(indices: Any, predictions: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both on the host.

    Raises:
        DataError: They do not fit to each other, or to ``length``.
    """
    if length < 1:
        raise DataError(f"length must be positive, got {length}")
    if isinstance(indices, torch.Tensor):
        indices = indices.detach().cpu().numpy()
    places = numpy.asarray(indices)
    if places.ndim != 1 or (places.dtype.kind not in "iu" and len(places)):
        raise DataError(
            f"indices must be integers, one for each row, got {places.dtype} of shape "
            f"{places.shape}"
        )
    rows = _on_host(predictions)
    if rows.dim() < 1 or len(rows) != len(places):
        raise DataError(f"{len(places)} indices for predictions of shape {tuple(rows.shape)}")
    outside = places[(places < 0) | (places >= length)]
    if len(outside):
        raise DataError(f"there is no sample {outside[0]} in a data set of {length}")
    return torch.from_numpy(places.astype(numpy.int64)), rows


def _on_host(tensor: Any) -> torch.Tensor:
    """Dense and contiguous.

    Raises:
        DataError: It is neither a tensor nor an array, or sparse, or its elements are no numbers.
    """
    if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
        return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if isinstance(tensor, numpy.ndarray):
        try:
            return torch.from_numpy(numpy.array(tensor, order="C"))
        except (TypeError, ValueError):
            raise DataError(f"an array of {tensor.dtype} cannot be sent; pass numbers") from None
    raise DataError(
        f"expected a dense tensor or an array, got {type(tensor).__name__}"
        + (f" ({tensor.layout}); pass tensor.to_dense()" if hasattr(tensor, "layout") else "")
    )


def _gather_bytes(
    mine: torch.Tensor, lengths: list[int], root: int | None, world: World
) -> torch.Tensor | None:
    """The memory of every rank's tensor, one after the other; None where it does not go."""
    raw = bytes_of(mine.view(-1))
    if root not in (None, world.rank):
        gather(None, raw, root, lengths=lengths, world=world)
        return None
    everything = torch.empty(sum(lengths), dtype=torch.uint8, device="cpu")
    if root is None:
        return all_gather(everything, raw, lengths=lengths, world=world)
    return gather(everything, raw, root, lengths=lengths, world=world)


def _same_kind(facts: list[Any]) -> list[Any]:
    """Dtype, shape of a row, and whether arrays were passed, of all ranks that have rows.

    Raises:
        DataError: They differ.
    """
    kinds = [kind for count, kind in facts if count] or [facts[0][1]]
    descriptions = [_describe(kind if count else kinds[0]) for count, kind in facts]
    if odd_ones(descriptions):
        raise DataError(
            f"predictions differ between ranks: {who_has_what(descriptions)}; pass one dtype and "
            "one shape of rows",
            on_every_rank=True,
        )
    return list(kinds[0])


def _check_once(everyones: NDArray[numpy.int64], counts: list[int], length: int) -> None:
    """Raises: DataError: Not every sample came exactly once."""
    seen = numpy.zeros(length, dtype=bool)
    seen[everyones] = True
    if len(everyones) == length and seen.all():
        return
    problems = []
    missing = numpy.flatnonzero(~seen)
    if len(missing):
        problems.append(f"{_named(missing)} of {length} have no prediction")
    ordered = numpy.sort(everyones)
    twice = numpy.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        ranks = numpy.repeat(numpy.arange(len(counts)), counts)[everyones == twice[0]].tolist()
        problems.append(f"{_named(twice)} came more than once, {twice[0]} from ranks {ranks}")
    raise DataError(
        f"{' and '.join(problems)}; pass the indices of a sampler that takes every sample once, "
        "mpiddl.ShardSampler for example",
        on_every_rank=True,
    )


def _named(samples: NDArray[numpy.int64]) -> str:
    listed = ", ".join(map(str, samples[:MOST_NAMED].tolist()))
    more = f" and {len(samples) - MOST_NAMED} more" if len(samples) > MOST_NAMED else ""
    return f"samples {listed}{more}"


def _describe(kind: list[Any]) -> str:
    dtype, shape, as_array = kind
    sizes = ", ".join(["n", *map(str, shape)])
    return f"{'array' if as_array else 'tensor'} {dtype.removeprefix('torch.')}[{sizes}]"


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype
