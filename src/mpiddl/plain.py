"""States as JSON and a list of tensors: what can be sent and stored without pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch

__all__ = ["decode", "encode", "gapless", "overwrite", "renamed_as"]


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


def decode(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """What ``encode`` was given, with these tensors.

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
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in ("dict", "counter"):  # such as MultiStepLR's milestones
        pairs = {decode(key, tensors): decode(item, tensors) for key, item in content}
        return pairs if kind == "dict" else Counter(pairs)
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind!r}")
    items = [decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def gapless(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself where its elements are one piece of memory that holds their values (and
    not their conjugates), else a copy that is."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.stride() == torch.empty_like(tensor, device="meta").stride():
        return tensor
    return tensor.contiguous()


def overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """``tensor.copy_(values)`` of the same shape, where ``tensor`` may be expanded too."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def renamed_as(names: Iterable[str], state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's ``state`` under ``names``: those of the same model, compiled or not.

    ``torch.compile`` puts ``_orig_mod.`` into the names of what it wraps.
    """
    known = {name.replace("_orig_mod.", ""): name for name in names}
    return {known.get(key.replace("_orig_mod.", ""), key): value for key, value in state.items()}
