"""A sample's rank by its key: it stays there when the data set grows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mpiddl.data.shards.kinds.base import checksum_of, refuse_empty
from mpiddl.data.shards.labels import values_of
from mpiddl.data.shards.permutation import Indices
from mpiddl.errors import DataError

__all__ = ["Hashed", "hashes_of"]

PIECE = 1 << 15
"""Keys hashed at a time: what is in work stays in the cache."""


class Hashed:
    """Each sample to the rank that the hash of its key names.

    Shares are even as far as chance goes: about sqrt(length / ranks) samples more or less.

    Args:
        length: Samples.
        keys: What a sample is called, for ever: integers or strings, one for each sample; default
            its index. Samples with one key share a rank.
        seed: Of the hash; another one deals the samples out in another way.

    Raises:
        DataError: Keys are neither all integers nor all strings, or not one for each sample.

    Source:
        Appleby, MurmurHash3 (the finalizer), for integers; CRC-32 first, for strings.
    """

    def __init__(
        self, length: int, keys: Sequence[Any] | NDArray[Any] | None = None, seed: int = 0
    ) -> None:
        refuse_empty(length)
        self.length = length
        self._salt = numpy.uint32(numpy.random.SeedSequence(seed).generate_state(1)[0])
        self._keys = None if keys is None else _numbers_of(keys, length)

    def facts(self) -> dict[str, Any]:
        keys = "none" if self._keys is None else checksum_of(self._keys)
        return {"seed": int(self._salt), "keys": keys}

    def shard(self, rank: int, size: int, epoch: int = 0) -> Indices:
        expected = self.length / size
        room = min(self.length, int(expected + 6 * expected**0.5) + 64)
        result = numpy.empty(room, dtype=numpy.int64)  # what is not used is never touched
        filled = 0
        low, extent = _range_of(rank, size)
        for start in range(0, self.length, PIECE):
            hashes = self._hashes(start, min(start + PIECE, self.length))
            hashes -= low
            mine = numpy.flatnonzero(hashes <= extent)
            mine += start
            if filled + len(mine) > len(result):  # few keys for many samples
                more = numpy.empty(len(result) + len(mine), dtype=numpy.int64)
                result = numpy.concatenate([result, more])
            result[filled : filled + len(mine)] = mine
            filled += len(mine)
        return result[:filled]

    def owners(self, indices: Indices, size: int) -> Indices:
        hashes = hashes_of(indices if self._keys is None else self._keys[indices], self._salt)
        return _owners(hashes, size)

    def lengths(self, size: int) -> list[int]:
        counts = numpy.zeros(size, dtype=numpy.int64)
        for start in range(0, self.length, PIECE):
            owners = _owners(self._hashes(start, min(start + PIECE, self.length)), size)
            counts += numpy.bincount(owners, minlength=size)
        return [int(count) for count in counts]

    def _hashes(self, start: int, stop: int) -> NDArray[numpy.uint32]:
        if self._keys is not None:
            return hashes_of(self._keys[start:stop], self._salt)
        if stop <= 1 << 32:
            return _finish(numpy.arange(start, stop, dtype=numpy.uint32), self._salt)
        return hashes_of(numpy.arange(start, stop), self._salt)


def hashes_of(numbers: Indices, salt: numpy.uint32) -> NDArray[numpy.uint32]:
    """A hash of each of ``numbers``. Shape as they have."""
    wide = numbers.astype(numpy.uint64)
    low = wide.astype(numpy.uint32)
    high = (wide >> numpy.uint64(32)).astype(numpy.uint32)
    if high.any():
        zero = _finish(numpy.zeros(1, dtype=numpy.uint32), salt)
        low ^= _finish(high, salt) ^ zero  # nothing where there is no high half
    return _finish(low, salt)


def _finish(numbers: NDArray[numpy.uint32], salt: numpy.uint32) -> NDArray[numpy.uint32]:
    """Mix all bits, in place."""
    numbers ^= salt
    shifted = numbers >> numpy.uint32(16)
    numbers ^= shifted
    numbers *= numpy.uint32(0x85EBCA6B)
    numpy.right_shift(numbers, numpy.uint32(13), out=shifted)
    numbers ^= shifted
    numbers *= numpy.uint32(0xC2B2AE35)
    numpy.right_shift(numbers, numpy.uint32(16), out=shifted)
    numbers ^= shifted
    return numbers


def _range_of(rank: int, size: int) -> tuple[numpy.uint32, numpy.uint32]:
    """The hashes that are ``rank``'s: the first of them, and how far the last one is from it."""
    low, high = -(-(rank << 32) // size), -(-((rank + 1) << 32) // size)
    return numpy.uint32(low), numpy.uint32(high - low - 1)


def _owners(hashes: NDArray[numpy.uint32], size: int) -> Indices:
    wide = hashes.astype(numpy.uint64) * numpy.uint64(size)
    wide >>= numpy.uint64(32)
    owners: Indices = wide.view(numpy.int64)
    return owners


def _numbers_of(keys: Sequence[Any] | NDArray[Any], length: int) -> Indices:
    """Integers as they are, strings by a checksum."""
    values = values_of(keys, length, "keys")
    if values.dtype.kind in "iu":
        return values.astype(numpy.int64)
    if values.dtype.kind == "U":
        return numpy.array([_checksum(key) for key in values.tolist()], dtype=numpy.int64)
    raise DataError(f"keys must all be integers or all be strings, got {values.dtype}")


def _checksum(key: str) -> int:
    """63 bits of two sums."""
    raw = key.encode()
    return (zlib.crc32(raw) << 32 | zlib.adler32(raw)) & (1 << 63) - 1
