"""``mpiddl.all_to_all``: a part from every rank to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from typing_extensions import Unpack

from mpiddl.api.arguments import (
    check_apart,
    check_length,
    check_same_dtype,
    describe_dtype,
    flat,
    parts_of,
)
from mpiddl.api.call import Checked, Options, TensorOrArray, new_channel, start
from mpiddl.collectives import all_to_all as algorithm
from mpiddl.comm.world import World, current_world
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["all_to_all"]


@overload
def all_to_all(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    output_lengths: Sequence[int] | None = ...,
    input_lengths: Sequence[int] | None = ...,
    async_: Literal[False] = ...,
    **others: Unpack[Options],
) -> TensorOrArray: ...
@overload
def all_to_all(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    output_lengths: Sequence[int] | None = ...,
    input_lengths: Sequence[int] | None = ...,
    async_: Literal[True],
    **others: Unpack[Options],
) -> Work: ...
def all_to_all(
    output: TensorOrArray,
    input: TensorOrArray,
    *,
    output_lengths: Sequence[int] | None = None,
    input_lengths: Sequence[int] | None = None,
    async_: bool = False,
    world: World | None = None,
    check: bool | None = None,
) -> TensorOrArray | Work:
    """Part r of ``input`` goes to rank r; part r of ``output`` comes from rank r.

    Args:
        output: Any dtype; must not overlap ``input``.
        input: The same dtype as ``output``; left as it is.
        output_lengths: Elements that come from each rank; default: all equal. What this rank
            says of rank r is what r's ``input_lengths`` says of this rank.
        input_lengths: Elements that go to each rank; default: all equal.
        async_: As for ``all_reduce``, like ``world`` and ``check``.

    Returns:
        ``output``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: The lengths, or the dtypes, do not fit.
        MismatchError: With ``check``: one rank sends another more or less than that one expects.
    """
    world = world or current_world()
    with Checked(lambda: f"all_to_all of {describe_dtype(input)}", world, check) as call:
        buffer, result = flat(input, any_dtype=True), flat(output, any_dtype=True)
        check_same_dtype(result, buffer)
        outgoing = parts_of(buffer, input_lengths, world, "input_lengths", "input")
        incoming = parts_of(result, output_lengths, world, "output_lengths", "output")
        call.lengths = [len(part) for part in outgoing], [len(part) for part in incoming]
        check_length(outgoing[world.rank], incoming[world.rank], world, "input", "output")
        check_apart(result, buffer)
    waits = algorithm.all_to_all(incoming, outgoing, new_channel(world))
    return start(waits, world, output, async_, device_of(buffer))
