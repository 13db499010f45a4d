"""A user's function in place of the all-reduce of a bucket.

def halved(state, bucket):
    half = bucket.buffer.to(torch.float16)
    yield from bucket.all_reduce(half)
    bucket.buffer.copy_(half)

model.register_comm_hook(None, halved)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpiddl.base.waits import Waits
from mpiddl.compress.base import Codec, GradientBucket

__all__ = ["CommHook"]


class CommHook(Codec):
    """A codec made of one generator function.

    Args:
        state: The function's first argument.
        hook: ``(state, bucket)``; leaves the reduced gradients in ``bucket.buffer``.

    Raises:
        TypeError: ``hook`` cannot be called; or later, on the first bucket: it is no generator.
    """

    def __init__(self, state: Any, hook: Callable[[Any, GradientBucket], Waits[None]]) -> None:
        if not callable(hook):
            raise TypeError(f"a comm hook is a generator function (state, bucket), not {hook!r}")
        self._state = state
        self._hook = hook

    def exchange(self, bucket: GradientBucket) -> Waits[None]:
        return self._hook(self._state, bucket)
