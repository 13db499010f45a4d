"""The index of a checkpoint: plain JSON, with the checksum of itself and of all other files.

Two lines: ``{"mpiddl_checkpoint": 2, "sha256": ...}``, the checksum of the second line, and the
contents. Version 1 had the state of every rank's random generators here, as text.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpiddl.api.fail_together import Tick
from mpiddl.checkpoint.tensors import PIECE_BYTES, nothing
from mpiddl.errors import CheckpointError

__all__ = ["INDEX", "RANDOM", "Index", "checksum", "read_index", "write_index"]

INDEX = "index.json"
RANDOM = None
"""What the state of the random generators is called among the parts: no part can have that name."""
FORMAT, VERSION, FIRST_VERSION = "mpiddl_checkpoint", 2, 1


@dataclass
class Index:
    """What is in a checkpoint.

    Attributes:
        step: Of the job.
        parts: Rank 0's states by name, as ``mpiddl.base.plain`` writes them. Its tensors have their
            numbers as names in the files. What another rank has different is there too:
            ``7.3``, rank 7's tensor 3, and ``7.parts``, its states as JSON.
        strides: For each tensor those that it had; files have all in the order of their dimensions.
        files: Name and SHA-256 of each file, in order.
        nodes: Ranks of each node of the job that wrote it.
        choices: What the job had found out by measuring.
        versions: Of what wrote it.
        plain: Names of the parts that had no ``state_dict()``; None: it was not written down.
        random: State of the random generators of each rank, in version 1.
    """

    step: int
    parts: dict[str, Any]
    strides: list[list[int]]
    files: list[tuple[str, str]]
    nodes: list[list[int]]
    choices: dict[str, Any]
    versions: dict[str, str]
    plain: list[str] | None = None
    random: list[dict[str, Any]] | None = None

    def verify(self, path: Path, tick: Tick = nothing) -> None:
        """Hold every file against its checksum.

        Args:
            path: The checkpoint's folder.
            tick: Called after each piece.

        Raises:
            CheckpointError: One is missing, truncated or corrupted.
        """
        for name, expected in self.files:
            try:
                found = checksum(path / name, tick)
            except OSError as error:
                raise CheckpointError(f"{path / name}: {error.strerror}") from None
            if found != expected:
                raise CheckpointError(f"{path / name} is truncated or corrupted: another checksum")


def checksum(path: Path, tick: Tick = nothing) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it; calls ``tick`` after each piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            tick()
    return digest.hexdigest()


def write_index(path: Path, index: Index) -> None:
    """Write and flush ``index`` in the folder ``path``."""
    body = json.dumps(asdict(index), allow_nan=False)
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
        version = int(header[FORMAT])
        if not FIRST_VERSION <= version <= VERSION:
            raise CheckpointError(
                f"{file} has version {version}, this mpiddl reads {FIRST_VERSION} to {VERSION}: "
                "load it with the mpiddl that wrote it, or a newer one"
            )
        if header["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            raise CheckpointError(f"{file} is truncated or corrupted: another checksum")
        contents = json.loads(body)
        if version == FIRST_VERSION:
            del contents["tensors"]  # which file each is in: files say that themselves
        index = Index(**contents)
        if any(Path(name).name != name for name, _ in index.files):
            raise CheckpointError(f"{file} names files that are not beside it")
        return index
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise CheckpointError(f"{file} is truncated, or no checkpoint of mpiddl's") from None
