"""The tensors of a checkpoint: who writes which, and their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mpiddl.checkpoint.index import checksum
from mpiddl.errors import CheckpointError

__all__ = ["file_name", "read_tensors", "shares_of_writers", "write_tensors"]


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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # safetensors wants memory that is contiguous, and nobody else's
        own = {str(number): _alone(tensor) for number, tensor in tensors.items()}
        save_file(own, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:
        raise OSError(None, str(error)) from None
    return checksum(path)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def read_tensors(path: Path, files: Sequence[str], where: Sequence[int]) -> list[torch.Tensor]:
    """All tensors, by number.

    Args:
        path: Of the checkpoint.
        files: Their names.
        where: For each tensor the number of the file that it is in.

    Raises:
        CheckpointError: A file is missing or broken, or lacks a tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = [load_file(path / name) for name in files]
        return [loaded[file][str(number)] for number, file in enumerate(where)]
    except (OSError, SafetensorError, LookupError) as error:
        raise CheckpointError(f"{path} is broken: {error}") from None
