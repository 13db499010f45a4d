"""The files of a checkpoint's tensors, in the format of safetensors, a piece at a time.

The safetensors library writes and reads a file in one call. Here a file goes through memory in
pieces: no rank holds more than one tensor of it, its checksum is made on the way, a full disk is an
error and no signal, and whoever waits sees that it goes on. The format is 8 bytes with the length
of the header, the header, which is JSON, and the tensors' memory, one after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mpiddl.api.fail_together import Tick
from mpiddl.base.segments import chunked
from mpiddl.collectives.channel import bytes_of
from mpiddl.devices.base import Buffer
from mpiddl.errors import CheckpointError

__all__ = [
    "METADATA",
    "PIECE_BYTES",
    "Kind",
    "Stored",
    "TensorWriter",
    "check_storable",
    "file_name",
    "in_file_order",
    "kind_of",
    "nothing",
    "shares_of_writers",
    "stored_tensors",
    "write_tensors",
]

PIECE_BYTES = 16 << 20
FLUSH_BYTES = 256 << 20
"""After so many bytes the disk is waited for: else all of the waiting comes at the end of the file,
and nobody sees that it goes on."""

METADATA = "__metadata__"
"""What the format calls the place for remarks: no tensor can have this name."""
MOST_HEADER_BYTES = 1 << 30

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPES = {name: getattr(torch, own) for name, own in _NAMES.items() if hasattr(torch, own)}
_CODES = {dtype: name for name, dtype in _DTYPES.items()}


def nothing() -> None:
    """For work that nobody waits for."""


class Kind(NamedTuple):
    """What must be known of a tensor before its memory comes.

    Attributes:
        code: Its dtype, as safetensors calls it.
        shape: Its sizes.
    """

    code: str
    shape: Sequence[int]

    @property
    def dtype(self) -> torch.dtype:
        """As torch calls it."""
        dtype: torch.dtype = _DTYPES[self.code]
        return dtype

    @property
    def nbytes(self) -> int:
        """Size of its memory in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def kind_of(tensor: torch.Tensor) -> Kind:
    """Of a tensor that ``check_storable`` let pass."""
    return Kind(_CODES[tensor.dtype], list(tensor.shape))


def check_storable(tensor: torch.Tensor, name: str) -> None:
    """Raises: ValueError: It is no dense tensor, or of a dtype that files do not have."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise ValueError(f"{name} is no dense tensor: safetensors files hold nothing else")
    if tensor.dtype not in _CODES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        hint = "torch.view_as_real(tensor)" if tensor.is_complex() else "a tensor of another dtype"
        raise ValueError(f"{name} is {dtype}, which safetensors files cannot hold; pass {hint}")


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


def in_file_order(kinds: Mapping[str, Kind]) -> list[str]:
    """Their names: widest elements first, so that each tensor begins at a multiple of its own."""
    return sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize)


class TensorWriter:
    """Writes a file, a tensor at a time.

    Args:
        path: The file; there is none yet.
        kinds: All of its tensors by name, in the order in which they will come.
        tick: Called after each piece.

    Raises:
        OSError: It could not be written; so for all methods.
    """

    def __init__(self, path: Path, kinds: Mapping[str, Kind], tick: Tick = nothing) -> None:
        self._tick = tick
        self._digest = hashlib.sha256()
        self._unflushed = 0
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        header, end = {}, 0
        for name, kind in kinds.items():
            begin, end = end, end + kind.nbytes
            header[name] = {
                "dtype": kind.code,
                "shape": list(kind.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        try:
            self._write(memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self._file.close()
            raise

    def write(self, tensor: torch.Tensor) -> None:
        """The next one, wherever it is and whatever its strides."""
        whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        memory = memoryview(bytes_of(whole).numpy())  # type: ignore[arg-type]
        for part in chunked(slice(0, len(memory)), PIECE_BYTES):
            self._write(memory[part])
            self._tick()

    def _write(self, memory: memoryview) -> None:
        self._digest.update(memory)
        while memory:
            written = self._file.write(memory)
            memory = memory[written:]
            self._unflushed += written
        if self._unflushed >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        os.fsync(self._file.fileno())
        self._unflushed = 0

    def finish(self) -> str:
        """All have come: flush and close the file. Returns: Its SHA-256."""
        with self._file:
            self._flush()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file, whole or not."""
        self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], tick: Tick = nothing) -> str:
    """Write tensors under their names, and flush them.

    Args:
        path: The file; there is none yet.
        tensors: By name.
        tick: Called after each piece.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: It could not be written.
    """
    kinds = {name: kind_of(tensor) for name, tensor in tensors.items()}
    names = in_file_order(kinds)
    with contextlib.closing(TensorWriter(path, {n: kinds[n] for n in names}, tick)) as writer:
        for name in names:
            writer.write(tensors[name])
        return writer.finish()


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: The file.
        begin: Where its memory begins there, in bytes.
        kind: Its dtype and shape.
    """

    file: Path
    begin: int
    kind: Kind

    def read(self, piece: Buffer, start: int) -> None:
        """Fill ``piece``, bytes on the host, with what is at ``start`` of its memory.

        Raises:
            OSError: It cannot be read.
            CheckpointError: The file ends before.
        """
        memory = memoryview(piece.numpy())  # type: ignore[arg-type]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.begin + start)
            while memory:
                nbytes = file.readinto(memory)
                if not nbytes:
                    raise CheckpointError(f"{self.file} is truncated")
                memory = memory[nbytes:]


def stored_tensors(path: Path) -> dict[str, Stored]:
    """What is in a file, by name.

    Raises:
        OSError: It cannot be read.
        CheckpointError: It is no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_HEADER_BYTES:
                raise ValueError("a header of such a length")
            header = json.loads(file.read(length))
            end = os.fstat(file.fileno()).st_size
        header.pop(METADATA, None)
        return {name: _stored(path, 8 + length, end, **entry) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is broken: it is no safetensors file") from None


def _stored(
    path: Path, after_header: int, end: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> Stored:
    kind = Kind(dtype, shape)
    first, last = (after_header + offset for offset in data_offsets)
    if min([first, *shape]) < 0 or last - first != kind.nbytes or last > end:
        raise ValueError("a tensor that is not there")
    return Stored(path, first, kind)
