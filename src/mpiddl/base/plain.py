"""States as JSON and a list of tensors: what can be sent and stored without pickle."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

__all__ = ["decode", "digest", "encode", "gapless", "overwrite", "place_of"]

COLUMNS = 1024
WORD = 8  # bytes


def encode(value: Any, where: str) -> tuple[Any, list[torch.Tensor]]:
    """``value`` as JSON, and the tensors in it, for which there are numbers there.

    Args:
        value: Tensors, numpy arrays, numbers, strings, bytes, and lists, tuples and dictionaries
            of such. A tensor that occurs twice is listed once.
        where: What it is called in errors.

    Raises:
        TypeError: It holds something else.
    """
    found = _Tensors()
    return _encode(value, found, where), found.tensors


class _Tensors:
    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[object, int] = {}

    def number(self, tensor: torch.Tensor) -> int:
        place: object = id(tensor)
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if place not in self._numbers:
            self._numbers[place] = len(self.tensors)
            self.tensors.append(tensor)
        return self._numbers[place]


def _encode(value: Any, found: _Tensors, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}  # JSON has neither NaN nor infinity
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta:
            raise TypeError(f"{where} is a sparse tensor, or one without memory: pass a dense one")
        return {"tensor": found.number(value.detach().resolve_conj().resolve_neg())}
    if isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in "biufc":
        kind = "array" if isinstance(value, numpy.ndarray) else "scalar"
        return {kind: found.number(torch.from_numpy(numpy.array(value)))}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, list | tuple):
        items = [_encode(item, found, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict):  # whose keys may be numbers, which JSON would make strings of
        return {
            "counter" if isinstance(value, Counter) else "dict": [
                [_encode(key, found, where), _encode(item, found, f"{where}[{key!r}]")]
                for key, item in value.items()
            ]
        }
    raise TypeError(
        f"{where} is a {type(value).__name__}: only tensors, numbers, strings, lists, tuples and "
        "dictionaries can be sent or stored"
    )


def decode(value: Any, tensors: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> Any:
    """What ``encode`` was given, with these tensors under their numbers.

    Raises:
        ValueError, LookupError, TypeError: ``encode`` did not make it.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("array", "scalar"):
        array = tensors[content].numpy()
        return array if kind == "array" else array[()]
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in ("dict", "counter"):  # such as MultiStepLR's milestones
        pairs = {decode(key, tensors): decode(item, tensors) for key, item in content}
        return pairs if kind == "dict" else Counter(pairs)
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind!r}")
    items = [decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def place_of(number: int, value: Any) -> str | None:
    """Where tensor ``number`` is in what ``encode`` made, as ``['model']['0.weight']``; None:
    nowhere."""
    if not isinstance(value, dict):
        return None
    ((kind, content),) = value.items()
    if kind in ("tensor", "array", "scalar"):
        return "" if content == number else None
    pairs = content if kind in ("dict", "counter") else []
    if kind in ("list", "tuple"):
        pairs = list(enumerate(content))
    for key, item in pairs:
        below = place_of(number, item)
        if below is not None:
            return f"[{key!r}]{below}"
    return None


def gapless(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself where its elements are one piece of memory that holds their values (and
    not their conjugates), else a copy that is."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.stride() == torch.empty_like(tensor, device="meta").stride():
        return tensor
    return tensor.contiguous()


def digest(tensor: torch.Tensor) -> str:
    """A checksum of all that makes two tensors the same: bits, order in memory, shape, dtype.

    Ten times as fast as a cryptographic hash: sums of columns of 8-byte words, with overflow. Only
    changes that cancel out in one column of 1,024 go unseen.
    """
    flat = gapless(tensor)
    data = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
    if data.storage_offset() % WORD:
        data = data.clone()
    whole = len(data) // (COLUMNS * WORD) * (COLUMNS * WORD)
    sums = data[:whole].view(torch.int64).view(-1, COLUMNS).sum(0)  # where the tensor is
    hashed = hashlib.blake2b(sums.cpu().numpy().data, digest_size=16)
    hashed.update(data[whole:].cpu().numpy().data)
    return f"{hashed.hexdigest()} {flat.dtype} {tuple(flat.shape)} {flat.stride()}"


def overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """``tensor.copy_(values)`` of the same shape, where ``tensor`` may be expanded too."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)
