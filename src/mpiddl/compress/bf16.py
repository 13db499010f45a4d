"""Gradients as bfloat16 on the wire: half the bytes."""

from __future__ import annotations

import torch

from mpiddl.base.waits import Waits
from mpiddl.compress.base import Codec, GradientBucket

__all__ = ["BF16"]


class BF16(Codec):
    """Gradients as bfloat16 on the wire, added in float32.

    A value is rounded when it leaves its rank, and the sum when it is handed out, each once
    (relative error up to 2**-8 of each): ``direct`` adds 16-bit floats in float32. Buckets that are
    neither float32 nor float64 are reduced as they are.
    """

    def exchange(self, bucket: GradientBucket) -> Waits[None]:
        if bucket.buffer.dtype not in (torch.float32, torch.float64):
            yield from bucket.all_reduce(bucket.buffer, weight=bucket.weight)
            return
        compressed = bucket.buffer.to(torch.bfloat16)
        yield from bucket.all_reduce(compressed, weight=bucket.weight, algorithm="direct")
        bucket.buffer.copy_(compressed)
