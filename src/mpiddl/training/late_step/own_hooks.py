"""Hooks in a user's modules that do not go with copies of these modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["OwnHook"]


class OwnHook:
    """``hook`` for the module that it is registered with. Copied or saved with that module, it
    becomes a hook that does nothing.

    Args:
        hook: A forward hook, or of whatever kind.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_of_a_copy, ()


def _hook_of_a_copy() -> Callable[..., None]:
    return _nothing


def _nothing(*_args: Any) -> None:
    pass
