"""The random generators of a rank, as plain JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

__all__ = ["random_state", "set_random_state"]


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, numpy and torch, and of this rank's GPU."""
    version, words, spare = random.getstate()
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), spare],
        "numpy": [name, keys.tobytes().hex(), position, has_gauss, gauss],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with what ``random_state`` told."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    name, keys, *rest = state["numpy"]
    words_of_numpy = numpy.frombuffer(bytes.fromhex(keys), dtype=numpy.uint32)
    numpy.random.set_state((name, words_of_numpy, *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
