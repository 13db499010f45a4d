"""The methods of a codec, and the bucket that it works on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpiddl.base.waits import Waits
from mpiddl.collectives.all_gather import all_gather
from mpiddl.collectives.broadcast import broadcast
from mpiddl.collectives.channel import bytes_of
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.registry import device_of
from mpiddl.engine.bucket_reductions import BucketReductions
from mpiddl.errors import GradientError
from mpiddl.gradients.bucket import Bucket

__all__ = ["Codec", "GradientBucket", "hook_of"]


@dataclass(frozen=True)
class GradientBucket:
    """A bucket as a codec sees it.

    Its collectives are generators: ``yield from`` them. They use the bucket's own messages, so
    that ranks may exchange their buckets in different orders; ``mpiddl.all_reduce`` and its kin
    must be called in the same order on every rank. One of a bucket's collectives ends before its
    next one begins.

    Attributes:
        number: This bucket's place in the plan, the same on every rank.
        buffer: The gradients, one after the other, in memory that ends up in ``param.grad``.
        names: Names of the parameters whose gradients are in it, whole or in part.
        weight: The factor of this rank's gradients, by which they are multiplied before they are
            added up. The factors of all ranks sum to 1.
    """

    number: int
    buffer: Buffer
    names: Sequence[str]
    weight: float
    _reductions: BucketReductions
    _made: list[Waits[None]] = field(default_factory=list)

    def all_reduce(
        self, buffer: Buffer, *, weight: float | None = None, algorithm: str | None = None
    ) -> Waits[None]:
        """Sum a 1-D tensor over all ranks, in place.

        Args:
            buffer: A tensor of the same length and dtype on every rank, in any memory.
            weight: The factor of this rank's tensor; pass ``bucket.weight`` here unless the values
                are weighted already.
            algorithm: An algorithm of ``mpiddl.all_reduce``; default the model's.
        """
        reduce = self._reductions.all_reduce
        return self._in_turn(lambda: reduce(self.number, buffer, weight, algorithm))

    def all_gather(self, parts: Sequence[Buffer]) -> Waits[None]:
        """Fill ``parts[r]`` with what rank r has in its own ``parts[r]``: 1-D tensors of the same
        dtype, of any lengths that all ranks know."""
        channel = self._reductions.channel_of(self.number)
        return self._in_turn(lambda: all_gather([bytes_of(part) for part in parts], channel))

    def broadcast(self, buffer: Buffer, root: int) -> Waits[None]:
        """Overwrite a 1-D tensor on every rank with that of rank ``root``."""
        channel = self._reductions.channel_of(self.number)
        chunk_bytes = chunk_bytes_for(device_of(buffer), channel.world)
        return self._in_turn(lambda: broadcast(bytes_of(buffer), root, channel, chunk_bytes))

    def _in_turn(self, make: Callable[[], Waits[None]]) -> Waits[None]:
        waits = self._when_iterated(make)
        self._made.append(waits)
        return waits

    def _when_iterated(self, make: Callable[[], Waits[None]]) -> Waits[None]:
        if any(inspect.getgeneratorstate(waits) == inspect.GEN_SUSPENDED for waits in self._made):
            raise GradientError(
                f"the comm hook began a second collective of bucket {self.number} before the first "
                "was over; `yield from` one after the other"
            )
        # Not before: who has a place in a queue must go on, or others wait behind it for ever.
        yield from make()

    def refuse_unfinished(self) -> None:
        """Raise GradientError if the codec has ended, but not all that it wanted reduced."""
        if any(inspect.getgeneratorstate(waits) != inspect.GEN_CLOSED for waits in self._made):
            raise GradientError(
                f"the comm hook made bucket.all_reduce(...) of bucket {self.number} and did not "
                "iterate it to its end, so nothing was reduced: write `yield from "
                "bucket.all_reduce(...)`"
            )


class Codec:
    """How the gradients of a bucket are exchanged.

    Every rank gives its model the same codec. What a codec keeps for later, such as rounding
    errors, belongs to ``bucket.names`` and the length of its buffer, never to its number alone:
    buckets are cut anew in the first steps, and whenever parameters are frozen or unfrozen.
    """

    def exchange(self, bucket: GradientBucket) -> Waits[None]:
        """Leave the weighted sum of all ranks' gradients in ``bucket.buffer``, the same bits on
        every rank. A generator, as all collectives are; ranks may come to their buckets in
        different orders."""
        raise NotImplementedError

    def plan_changed(self, buckets: Sequence[Bucket]) -> None:
        """These are the buckets from the next backward on."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed job must know, as JSON and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what ``state_dict()`` returned in an earlier job."""


def hook_of(codec: Codec, reductions: BucketReductions) -> Callable[[Bucket, float], Waits[None]]:
    """The function that ``reductions`` runs for a bucket in place of an all-reduce."""

    def exchange(bucket: Bucket, weight: float) -> Waits[None]:
        seen = GradientBucket(bucket.number, bucket.buffer, bucket.names, weight, reductions)
        waits = codec.exchange(seen)
        if not isinstance(waits, Iterator):
            raise TypeError(
                f"the comm hook returned a {type(waits).__name__}, but hooks are generators: "
                "`yield from bucket.all_reduce(...)` takes the place of torch's Future, and what "
                "is in bucket.buffer at the end is the gradient"
            )
        return _to_the_end(waits, seen)

    return exchange


def _to_the_end(waits: Waits[None], bucket: GradientBucket) -> Waits[None]:
    yield from _in_plain_mode(waits, device_of(bucket.buffer))
    bucket.refuse_unfinished()


def _in_plain_mode(waits: Waits[None], device: Device) -> Waits[None]:
    """``waits`` without autograd and outside of inference mode, whoever drives it: tensors that a
    codec makes in one turn can be used in the next. On a GPU in line with what the exchange adds.
    """
    while True:
        with torch.inference_mode(mode=False), torch.no_grad(), device.stream():
            try:
                wait = next(waits)
            except StopIteration:
                return
        yield wait
