"""The tensors of a checkpoint: who writes which, and their files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mpiddl.checkpoint.index import Index, checksum
from mpiddl.errors import CheckpointError

__all__ = ["file_name", "read_tensors", "shares_of_writers", "write_model", "write_tensors"]


def file_name(number: int) -> str:
    """Of the file that writer ``number`` writes."""
    return f"part-{number:03d}.safetensors"


def shares_of_writers(nbytes: Sequence[int], writers: int) -> list[int]:
    """Who writes each tensor: largest first, always to who has least. The same on every rank."""
    loads = [0] * writers
    owners = [0] * len(nbytes)
    for number in sorted(range(len(nbytes)), key=lambda at: (-nbytes[at], at)):
        owner = loads.index(min(loads))
        owners[number] = owner
        loads[owner] += nbytes[number]
    return owners


def write_tensors(path: Path, tensors: dict[int, torch.Tensor]) -> str:
    """Write tensors under their numbers, and flush them. Returns: The file's checksum.

    Raises:
        OSError: It could not be written.
    """
    _write({str(number): tensor for number, tensor in tensors.items()}, path)
    return checksum(path)


def write_model(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a model's ``state_dict()`` for others to use; the file is whole at any moment.

    Raises:
        OSError: It could not be written.
    """
    part = path.with_name(f".{path.name}")
    try:
        _write(state, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # safetensors wants memory that is contiguous, and that no other tensor shares
        seen: set[int] = set()
        own = {name: _alone(tensor, seen) for name, tensor in tensors.items()}
        save_file(own, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def _alone(tensor: torch.Tensor, seen: set[int]) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if whole and tensor.data_ptr() not in seen:
        seen.add(tensor.data_ptr())
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def read_tensors(path: Path, index: Index) -> list[torch.Tensor]:
    """All tensors, by number, in memory of their own and in the strides that they had.

    Fused optimizers go through a parameter and its state as flat memory: strides must agree.

    Args:
        path: Of the checkpoint.
        index: What is in it.

    Raises:
        CheckpointError: A file is missing or broken, or lacks a tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = [load_file(path / name) for name, _ in index.files]
        found = []
        for number, (file, strides) in enumerate(zip(index.tensors, index.strides, strict=True)):
            stored = loaded[file].pop(str(number))
            own = torch.empty_strided(stored.shape, strides, dtype=stored.dtype, device="cpu")
            found.append(own.copy_(stored))
        return found
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is broken: {error}") from None
