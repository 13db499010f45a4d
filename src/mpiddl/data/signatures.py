"""One rule for all calls of ``mpiddl.data``: ``world`` comes right behind what the call works on.

It may be passed by position or by name; all options behind it are passed by name only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from mpiddl.comm.world import World

__all__ = ["checks_world"]

WORLDS = ("world", "group")
"""What it is called here, and what torchmetrics calls it."""
P = ParamSpec("P")
T = TypeVar("T")


def checks_world(function: Callable[P, T]) -> Callable[P, T]:
    """A public function or ``__init__`` that refuses a World in any other place, and others in its.

    Behind any number of arrays, where Python knows by name only, a last World is taken for it.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters)
    takes = "world" in parameters
    many = any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values())

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if takes and many and args and isinstance(args[-1], World) and kwargs.get("world") is None:
            *rest, kwargs["world"] = args
            args = tuple(rest)
        given = dict(zip(parameters, args, strict=False)) if not many else {"arrays": args}
        for key, value in {**given, **kwargs}.items():
            several = value if key == "arrays" and many else (value,)
            if key not in WORLDS and any(isinstance(each, World) for each in several):
                raise TypeError(_misplaced(_name_of(function, args), key, takes))
        world = given.get("world", kwargs.get("world"))
        if takes and not (world is None or _is_world(world)):
            raise TypeError(
                f"{_name_of(function, args)}: world must be what mpiddl.init() or world.split() "
                f"returned, got {type(world).__name__} {world!r}; options are passed by name"
            )
        return function(*args, **kwargs)

    checked.checks_world = True  # type: ignore[attr-defined]
    return checked


def _name_of(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """As the caller wrote it: for ``__init__`` the class."""
    name = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
    return f"{name}()"


def _misplaced(name: str, key: str, takes: bool) -> str:
    if not takes:
        return f"{name} takes no world, but got one as {key}: it needs no other ranks"
    return (
        f"{name} got a World as {key}; it belongs right behind what the call works on, or pass "
        "world=..."
    )


def _is_world(value: Any) -> bool:
    """Also what has a rank and a size only, which is enough to compute shards."""
    return hasattr(value, "rank") and hasattr(value, "size")
