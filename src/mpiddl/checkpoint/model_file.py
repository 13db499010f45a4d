"""A model alone, in a file for others to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mpiddl.api.fail_together import Tick
from mpiddl.base.compiled_names import plain_name
from mpiddl.checkpoint.tensors import METADATA, check_storable, nothing, write_tensors
from mpiddl.errors import CheckpointError

__all__ = ["check_model", "write_model"]


def check_model(state: Mapping[str, torch.Tensor]) -> None:
    """Whether ``write_model`` could write it.

    Raises:
        CheckpointError: Names a tensor that it could not.
    """
    for name, tensor in state.items():
        if plain_name(name) == METADATA:
            raise CheckpointError(
                f"a tensor of the model is named {METADATA!r}, which means something else in "
                "safetensors files: give that parameter or buffer another name",
                on_every_rank=True,
            )
        try:
            check_storable(tensor, f"{name!r} of the model")
        except ValueError as error:
            raise CheckpointError(str(error), on_every_rank=True) from None


def write_model(state: Mapping[str, torch.Tensor], path: Path, tick: Tick = nothing) -> None:
    """Write a model's ``state_dict()`` for others to use; the file is whole at any moment.

    Names are those of the model before torch.compile: without ``_orig_mod.``.

    Args:
        state: Tensors by name.
        path: The file; one that is there is replaced.
        tick: Called after each piece.

    Raises:
        OSError: It could not be written.
        CheckpointError: It has a tensor that cannot be written.
    """
    check_model(state)
    part = path.with_name(f".{path.name}")
    part.unlink(missing_ok=True)
    try:
        plain = {plain_name(name): tensor for name, tensor in state.items()}
        write_tensors(part, plain if len(plain) == len(state) else state, tick)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
