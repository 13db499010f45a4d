"""The index of a checkpoint: plain JSON, with the checksum of itself and of all other files.

Two lines: ``{"mpiddl_checkpoint": 1, "sha256": ...}``, the checksum of the second line, and the
contents.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpiddl.errors import CheckpointError

__all__ = ["INDEX", "Index", "checksum", "read_index", "write_index"]

INDEX = "index.json"
FORMAT, VERSION = "mpiddl_checkpoint", 1
PIECE_BYTES = 1 << 20


@dataclass
class Index:
    """What is in a checkpoint.

    Attributes:
        step: Of the job.
        parts: The states by name, as ``mpiddl.plain`` writes them.
        tensors: For each tensor the number of the file that it is in.
        strides: For each tensor those that it had; files have all in the order of their dimensions.
        files: Name and SHA-256 of each file, in order.
        nodes: Ranks of each node of the job that wrote it.
        random: State of the random generators of each rank.
        choices: What the job had found out by measuring.
        versions: Of what wrote it.
    """

    step: int
    parts: dict[str, Any]
    tensors: list[int]
    strides: list[list[int]]
    files: list[tuple[str, str]]
    nodes: list[list[int]]
    random: list[dict[str, Any]]
    choices: dict[str, Any]
    versions: dict[str, str]

    def verify(self, path: Path) -> None:
        """Hold every file against its checksum.

        Raises:
            CheckpointError: One is missing, truncated or corrupted.
        """
        for name, expected in self.files:
            try:
                found = checksum(path / name)
            except OSError as error:
                raise CheckpointError(f"{path / name}: {error.strerror}") from None
            if found != expected:
                raise CheckpointError(f"{path / name} is truncated or corrupted: another checksum")


def checksum(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def write_index(path: Path, index: Index) -> None:
    """Write and flush ``index`` in the folder ``path``."""
    body = json.dumps(asdict(index))
    head = {FORMAT: VERSION, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    with open(path / INDEX, "w") as file:
        file.write(f"{json.dumps(head)}\n{body}\n")
        file.flush()
        os.fsync(file.fileno())


def read_index(path: Path) -> Index:
    """The index of the checkpoint ``path``.

    Raises:
        CheckpointError: There is none, or it is broken or of another program.
    """
    file = path / INDEX
    try:
        head, _, body = file.read_text().partition("\n")
        header = json.loads(head)
        if not body.endswith("\n"):
            raise CheckpointError(f"{file} is truncated")
        body = body[:-1]
        if header[FORMAT] != VERSION:
            raise CheckpointError(
                f"{file} has version {header[FORMAT]}, this mpiddl reads {VERSION}"
            )
        if header["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            raise CheckpointError(f"{file} is truncated or corrupted: another checksum")
        index = Index(**json.loads(body))
        if any(Path(name).name != name for name, _ in index.files):
            raise CheckpointError(f"{file} names files that are not beside it")
        return index
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise CheckpointError(f"{file} is truncated, or no checkpoint of mpiddl's") from None
