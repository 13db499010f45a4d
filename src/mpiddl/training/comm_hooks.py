"""What becomes of a bucket in place of its all-reduce: the place for compression.

A hook is a generator, as all collectives are: it yields what it waits for, and may do anything
with the bucket in between. Ranks may call it for their buckets in different orders.

    def halved(state, bucket):
        half = bucket.buffer.to(torch.float16)
        yield from bucket.all_reduce(half)
        bucket.buffer.copy_(half)

    model.register_comm_hook(None, halved)

Buckets are cut anew in the first steps, and whenever parameters are frozen or unfrozen: what a
hook keeps for later, such as rounding errors, belongs to ``bucket.names`` and the length of its
buffer, never to its number alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpiddl.base.waits import Waits
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.registry import device_of
from mpiddl.errors import GradientError
from mpiddl.gradients.bucket import Bucket

__all__ = ["CommHook", "GradientBucket", "bf16_compress", "hook_for_buckets"]


@dataclass(frozen=True)
class GradientBucket:
    """What a hook sees of a bucket.

    Attributes:
        number: In plan order; the same on every rank.
        buffer: The gradients, one after the other, in memory that ends up in ``param.grad``.
        names: The parameters whose gradients are in it, whole or in part.
        weight: This rank's in the mean: what its gradients are multiplied by before they are
            added up. The weights of all ranks sum to 1.
    """

    number: int
    buffer: Buffer
    names: Sequence[str]
    weight: float
    _all_reduce: Callable[[Buffer, float | None, str | None], Waits[None]]
    _made: list[Waits[None]] = field(default_factory=list)

    def all_reduce(
        self, buffer: Buffer, *, weight: float | None = None, algorithm: str | None = None
    ) -> Waits[None]:
        """Sum a 1-D tensor over all ranks, in place, with this bucket's own messages.

        Not ``mpiddl.all_reduce``: that must be called in the same order on every rank. ``yield
        from`` it: nothing begins before, and one of a bucket ends before its next one begins.

        Args:
            buffer: Of the same length and dtype on every rank; any memory.
            weight: What this rank's is multiplied by; pass ``bucket.weight`` here unless the values
                are weighted already.
            algorithm: As for ``mpiddl.all_reduce``; default the model's.
        """
        waits = self._when_iterated(buffer, weight, algorithm)
        self._made.append(waits)
        return waits

    def _when_iterated(
        self, buffer: Buffer, weight: float | None, algorithm: str | None
    ) -> Waits[None]:
        if any(inspect.getgeneratorstate(waits) == inspect.GEN_SUSPENDED for waits in self._made):
            raise GradientError(
                f"the comm hook began a second all_reduce of bucket {self.number} before the first "
                "was over; `yield from` one after the other"
            )
        # Not before: who has a place in a queue must go on, or others wait behind it for ever.
        yield from self._all_reduce(buffer, weight, algorithm)

    def refuse_unfinished(self) -> None:
        """Raise GradientError if the hook has ended, but not all that it wanted reduced."""
        if any(inspect.getgeneratorstate(waits) != inspect.GEN_CLOSED for waits in self._made):
            raise GradientError(
                f"the comm hook made bucket.all_reduce(...) of bucket {self.number} and did not "
                "iterate it to its end, so nothing was reduced: write `yield from "
                "bucket.all_reduce(...)`"
            )


CommHook = Callable[[Any, GradientBucket], Waits[None]]
"""``(state, bucket)``: leaves the reduced gradients in ``bucket.buffer``."""


def hook_for_buckets(
    state: Any,
    hook: CommHook,
    all_reduce: Callable[[int, Buffer, float | None, str | None], Waits[None]],
) -> Callable[[Bucket, float], Waits[None]]:
    """What the library does with a bucket and this rank's weight where a user has a hook.

    Args:
        state: For the hook.
        hook: The user's.
        all_reduce: With the messages of a bucket with this number.

    Raises:
        TypeError: ``hook`` cannot be called; or later, on the first bucket: it is no generator.
    """
    if not callable(hook):
        raise TypeError(f"a comm hook is a generator function (state, bucket), not {hook!r}")

    def reduce(bucket: Bucket, weight: float) -> Waits[None]:
        own_all_reduce = functools.partial(all_reduce, bucket.number)
        seen = GradientBucket(bucket.number, bucket.buffer, bucket.names, weight, own_all_reduce)
        waits = hook(state, seen)
        if not isinstance(waits, Iterator):
            raise TypeError(
                f"the comm hook returned a {type(waits).__name__}, but hooks are generators: "
                "`yield from bucket.all_reduce(...)` takes the place of torch's Future, and what "
                "is in bucket.buffer at the end is the gradient"
            )
        return _to_the_end(waits, seen)

    return reduce


def _to_the_end(waits: Waits[None], bucket: GradientBucket) -> Waits[None]:
    yield from _in_plain_mode(waits, device_of(bucket.buffer))
    bucket.refuse_unfinished()


def _in_plain_mode(waits: Waits[None], device: Device) -> Waits[None]:
    """``waits`` without autograd and outside of inference mode, whoever drives it: tensors that a
    hook makes in one turn can be used in the next. On a GPU in line with what the exchange adds."""
    while True:
        with torch.inference_mode(mode=False), torch.no_grad(), device.stream():
            try:
                wait = next(waits)
            except StopIteration:
                return
        yield wait


def bf16_compress(state: Any, bucket: GradientBucket) -> Waits[None]:
    """Gradients as bfloat16 on the wire, added in float32: half the bytes.

    A value is rounded when it leaves its rank, and the sum when it is handed out, each once
    (relative error up to 2**-8 of each): ``direct`` adds 16-bit floats in float32. Buckets that are
    neither float32 nor float64 are reduced as they are. ``state`` is not used.
    """
    if bucket.buffer.dtype not in (torch.float32, torch.float64):
        yield from bucket.all_reduce(bucket.buffer, weight=bucket.weight)
        return
    compressed = bucket.buffer.to(torch.bfloat16)
    yield from bucket.all_reduce(compressed, weight=bucket.weight, algorithm="direct")
    bucket.buffer.copy_(compressed)
