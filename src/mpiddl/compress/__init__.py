"""How a bucket is written for the wire and read back: one file a codec.

    model = mpiddl.DataParallel(model, compression=mpiddl.compress.BF16())

A new codec is a file here, a line below, and a test parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpiddl.base.lazy import lazy_names

if TYPE_CHECKING:
    from mpiddl.compress.base import Codec as Codec
    from mpiddl.compress.base import GradientBucket as GradientBucket
    from mpiddl.compress.bf16 import BF16 as BF16
    from mpiddl.compress.comm_hook import CommHook as CommHook

_HOMES = {
    "BF16": "mpiddl.compress.bf16",
    "Codec": "mpiddl.compress.base",
    "CommHook": "mpiddl.compress.comm_hook",
    "GradientBucket": "mpiddl.compress.base",
}

__all__ = ["BF16", "Codec", "CommHook", "GradientBucket"]


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
