"""Where the tensors of a checkpoint go as they arrive.

They go into the model's own memory, or to where and how an optimizer wants its state: no rank holds
a second copy of its model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mpiddl.base.plain import gapless
from mpiddl.checkpoint.tensors import Kind

__all__ = ["Places", "keep_bits", "places_in_model", "places_in_optimizer"]


class Places(dict[int, torch.Tensor]):
    """A place for each tensor of a part, by number; those that are asked for are made.

    Args:
        kinds: Of each tensor.
        strides: Those that each one had when it was saved, as far as they are known.
    """

    def __init__(self, kinds: Mapping[int, Kind], strides: Mapping[int, list[int]]) -> None:
        super().__init__()
        self._kinds = kinds
        self._strides = strides

    def __missing__(self, number: int) -> torch.Tensor:
        kind = self._kinds[number]
        place = torch.empty(tuple(kind.shape), dtype=kind.dtype, device="cpu")
        strides = self._strides.get(number, [])
        if len(strides) == place.dim():
            place = torch.empty_strided(place.shape, strides, dtype=kind.dtype, device="cpu")
        self[number] = place
        return place

    def replace(self, places: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take better places.

        Args:
            places: One that was made here and is not needed, and the one that takes its place.
        """
        numbers = {id(place): number for number, place in self.items()}
        self.update([(numbers[id(made)], better) for made, better in places])


def places_in_model(
    stored: Mapping[str, Any], here: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's own tensors, for those of its state.

    ``load_state_dict`` is then given a state that is the model's own memory already.

    Args:
        stored: The state to be loaded, of places that are not filled yet.
        here: The model's ``state_dict()``.
    """
    for name, made in stored.items():
        own = here[name]
        if isinstance(made, torch.Tensor) and gapless(own).data_ptr() == own.data_ptr():
            yield made, own.detach()


def places_in_optimizer(optimizer: Any, state: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """On each parameter's device and in its strides, for state of the parameter's shape.

    Fused optimizers go through a parameter and its state as flat memory: momentum in other strides
    would belong to other weights.
    """
    for parameter, entry in _by_parameter(optimizer, state):
        for made in entry.values():
            if isinstance(made, torch.Tensor) and made.shape == parameter.shape and made.dim() > 0:
                yield made, torch.empty_like(parameter.detach(), dtype=made.dtype)


def keep_bits(optimizer: Any, state: Any) -> None:
    """Give an optimizer the dtypes that its state was saved with.

    ``torch.optim.Optimizer.load_state_dict`` casts floats to the parameter's dtype, and would round
    float32 moments and weights of a bfloat16 model.

    Args:
        optimizer: It has loaded ``state``.
        state: What it was given.
    """
    for parameter, entry in _by_parameter(optimizer, state):
        loaded = optimizer.state.get(parameter)
        if isinstance(loaded, dict):
            for name in loaded.keys() & entry.keys():
                loaded[name] = _in_stored_dtype(loaded[name], entry[name])


def _in_stored_dtype(loaded: Any, stored: Any) -> Any:
    if isinstance(loaded, torch.Tensor) and isinstance(stored, torch.Tensor):
        same = loaded.dtype == stored.dtype or loaded.shape != stored.shape
        return loaded if same else stored.to(loaded.device)
    if type(loaded) is not type(stored):
        return loaded
    if isinstance(loaded, list | tuple) and len(loaded) == len(stored):
        return type(loaded)(map(_in_stored_dtype, loaded, stored))
    if isinstance(loaded, dict) and loaded.keys() == stored.keys():
        return {name: _in_stored_dtype(loaded[name], stored[name]) for name in loaded}
    return loaded


def _by_parameter(optimizer: Any, state: Any) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Parameters and the state of each; nothing, if these are no optimizer and its state."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not isinstance(state, dict):
        return
    if not isinstance(state.get("state"), dict) or not isinstance(state.get("param_groups"), list):
        return
    stored = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for number, parameter in zip(stored, parameters, strict=False):  # it refuses other numbers
        entry = state["state"].get(number)
        if isinstance(entry, dict):
            yield parameter, entry
