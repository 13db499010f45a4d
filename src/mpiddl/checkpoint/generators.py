"""The random generators of a rank, as values that checkpoints can hold."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy
import numpy.typing
import torch

__all__ = ["from_text", "random_state", "set_random_state"]

State = dict[str, Any]


def random_state(device: torch.device) -> State:
    """Of Python, numpy and torch, and of this rank's GPU: what differs between ranks is tensors."""
    version, words, spare = random.getstate()
    name, keys, *rest = numpy.random.get_state(legacy=True)
    state = {
        "python": [version, _integers(words), numpy.array([math.nan if spare is None else spare])],
        "numpy": [name, _integers(keys), numpy.array(rest, numpy.float64)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: State, device: torch.device) -> None:
    """Go on with what ``random_state`` told."""
    version, words, (spare,) = state["python"]
    random.setstate((version, tuple(words.tolist()), None if math.isnan(spare) else float(spare)))
    name, keys, (position, has_gauss, gauss) = state["numpy"]
    words_of_numpy = keys.astype(numpy.uint32)
    numpy.random.set_state((name, words_of_numpy, int(position), int(has_gauss), float(gauss)))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def from_text(state: State) -> State:
    """What version 1 of checkpoints had in its index."""
    version, words, spare = state["python"]
    name, keys, *rest = state["numpy"]
    return {
        "python": [version, _integers(words), [math.nan if spare is None else spare]],
        "numpy": [name, numpy.frombuffer(bytes.fromhex(keys), dtype=numpy.uint32), rest],
        **{key: _bytes(state[key]) for key in ("torch", "cuda") if key in state},
    }


def _integers(words: Any) -> numpy.typing.NDArray[numpy.int64]:
    return numpy.asarray(words, numpy.int64)  # torch has other widths since lately only


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
