"""The steps that all public collectives share: checked, compared between ranks, started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypedDict, TypeVar
from weakref import WeakValueDictionary

import numpy
import torch

from mpiddl.base.waits import Waits
from mpiddl.collectives import objects
from mpiddl.collectives.channel import Channel, MessageChannel
from mpiddl.collectives.node.lanes import Foreground
from mpiddl.comm.world import World
from mpiddl.devices.base import Device
from mpiddl.devices.host import HOST
from mpiddl.engine.engine import engine_of
from mpiddl.engine.work import Work
from mpiddl.errors import MismatchError
from mpiddl.gradients.agreement import odd_ones, who_has_what
from mpiddl.observe import activity

__all__ = ["Checked", "Options", "TensorOrArray", "launch", "new_channel", "run", "start"]

T = TypeVar("T")
TensorOrArray = TypeVar("TensorOrArray", torch.Tensor, numpy.ndarray[Any, Any])


class Options(TypedDict, total=False):
    """Keywords that every public collective takes; ``all_reduce`` explains them."""

    world: World | None
    check: bool | None


class Checked:
    """``with Checked(describe, world, check):`` around whatever looks at a user's arguments.

    Where calls are compared between ranks, an error that is raised inside leaves the block once all
    ranks have been told of it, and an error of another rank is raised here, too.

    Args:
        describe: Returns the call in words. Two ranks that make the same call say the same.
        world: The ranks that take part.
        check: Whether calls are compared; None: as MPIDDL_CHECK says.

    Attributes:
        lengths: In an all-to-all, the elements that go to each rank, and those that come from
            each. What one rank sends, another must expect.

    Raises:
        MismatchError: Another rank could not take part, or ranks made different calls.
    """

    def __init__(self, describe: Callable[[], str], world: World, check: bool | None) -> None:
        self._describe = describe
        self._world = world
        self._check = world.settings.check if check is None else check
        self.lengths: tuple[list[int], list[int]] | None = None

    def __enter__(self) -> Checked:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._check and (error is None or isinstance(error, Exception)):
            others = self._compare(error)
            if error is None and others is not None:
                raise others

    def _compare(self, problem: BaseException | None) -> MismatchError | None:
        """Tell all ranks about this call. Collective. Returns: what is wrong elsewhere."""
        world = self._world
        mine = [self._describe(), problem and str(problem), self.lengths]
        calls = run(world, objects.gather_json(mine, None, new_channel(world)))
        for rank, (_, reason, _) in enumerate(calls):
            if reason:
                return MismatchError(f"rank {rank} could not take part: {reason}")
        descriptions = [description for description, _, _ in calls]
        if odd_ones(descriptions):
            return MismatchError(
                f"ranks called different collectives: {who_has_what(descriptions)}; every rank "
                "must make the same calls, with the same shape, dtype, op and algorithm"
            )
        return _unexpected([lengths for _, _, lengths in calls if lengths is not None])


def _unexpected(lengths: Sequence[tuple[list[int], list[int]]]) -> MismatchError | None:
    """What to raise if a rank sends another what that one does not expect."""
    for sender, (outgoing, _) in enumerate(lengths):
        for receiver, (_, incoming) in enumerate(lengths):
            if outgoing[receiver] != incoming[sender]:
                return MismatchError(
                    f"rank {sender} sends {outgoing[receiver]} elements to rank {receiver}, which "
                    f"expects {incoming[sender]}; its output_lengths[{sender}] must be rank "
                    f"{sender}'s input_lengths[{receiver}]"
                )
    return None


class _AsyncWorks(WeakValueDictionary[int, Work]):
    """Works by tag. Those that are complete, and that nobody keeps, are gone."""

    def __init__(self, world: World) -> None:
        super().__init__()


def new_channel(world: World, lanes: Foreground | None = None) -> Channel:
    """The messages of one collective, which every rank starts as its next, and its lane.

    Tags are used again. What still runs on this rank with the same tag is completed first, or
    its messages would be taken for the new one's.

    Raises:
        NestedCallError: The caller is itself part of a collective. It has no tag, and no place in
            a lane's queue, which nobody would leave.
    """
    activity.refuse_nested()
    tag = world.tags.foreground()
    earlier = world.service(_AsyncWorks).get(tag)
    if earlier is not None and not earlier.complete:
        engine_of(world).drive([earlier])
    return MessageChannel(world, tag, lane=lanes.next() if lanes else None)


def run(world: World, waits: Waits[Any], device: Device = HOST) -> Any:
    """Run a collective to its end; return its result."""
    return engine_of(world).run(waits, world, device)


def launch(
    waits: Waits[Any], world: World, result: T, async_: bool, device: Device = HOST
) -> T | Work:
    """With ``async_`` a ``Work`` whose ``wait()`` returns ``result``, else ``result`` once the
    collective is complete."""
    if async_:
        return engine_of(world).submit(waits, world, result=result, device=device)
    engine_of(world).run(waits, world, device)
    return result


def start(
    waits: Waits[Any], world: World, result: T, async_: bool, device: Device = HOST
) -> T | Work:
    """Launch a collective on the channel that was made last; see ``launch``."""
    started = launch(waits, world, result, async_, device)
    if isinstance(started, Work):
        world.service(_AsyncWorks)[world.tags.last] = started
    return started
