"""``mpiddl.send`` and ``mpiddl.recv``: messages between two ranks."""

from __future__ import annotations

from typing import Literal, overload

from mpiddl.api.arguments import flat
from mpiddl.api.call import TensorOrArray, launch
from mpiddl.base.units import integer
from mpiddl.collectives import send_recv as algorithm
from mpiddl.collectives.channel import Channel, MessageChannel
from mpiddl.comm.world import World, current_world
from mpiddl.devices.base import Buffer
from mpiddl.devices.registry import device_of
from mpiddl.engine.work import Work

__all__ = ["recv", "send"]


@overload
def send(
    tensor: TensorOrArray,
    peer: int,
    tag: int = ...,
    *,
    async_: Literal[False] = ...,
    world: World | None = ...,
) -> TensorOrArray: ...
@overload
def send(
    tensor: TensorOrArray,
    peer: int,
    tag: int = ...,
    *,
    async_: Literal[True],
    world: World | None = ...,
) -> Work: ...
def send(
    tensor: TensorOrArray,
    peer: int,
    tag: int = 0,
    *,
    async_: bool = False,
    world: World | None = None,
) -> TensorOrArray | Work:
    """Send ``tensor`` to rank ``peer``, which calls ``recv`` with the same tag.

    Messages of one tag between two ranks arrive in the order in which they were sent. A
    blocking send of something large returns once the peer receives it: two ranks that send to
    each other first, and receive then, wait for ever; use ``async_``.

    Args:
        tensor: A contiguous torch tensor (CPU or GPU), numpy or CuPy array of any dtype.
        peer: Another rank.
        tag: 0 to 255, tells messages apart.
        async_: Return a ``Work`` at once; ``tensor`` must be left alone until its ``wait()``
            returns.
        world: The ranks; default those of ``mpiddl.init()``.

    Returns:
        ``tensor``, or a ``Work`` whose ``wait()`` returns it.

    Raises:
        ValueError: ``peer`` is not another rank, or ``tag`` is out of range.
    """
    world = world or current_world()
    buffer, peer, channel = _message(tensor, peer, tag, world)
    return launch(algorithm.send(buffer, peer, channel), world, tensor, async_, device_of(buffer))


@overload
def recv(
    tensor: TensorOrArray,
    peer: int,
    tag: int = ...,
    *,
    async_: Literal[False] = ...,
    world: World | None = ...,
) -> TensorOrArray: ...
@overload
def recv(
    tensor: TensorOrArray,
    peer: int,
    tag: int = ...,
    *,
    async_: Literal[True],
    world: World | None = ...,
) -> Work: ...
def recv(
    tensor: TensorOrArray,
    peer: int,
    tag: int = 0,
    *,
    async_: bool = False,
    world: World | None = None,
) -> TensorOrArray | Work:
    """Overwrite ``tensor`` with what rank ``peer`` sends with the same tag.

    Arguments and result as for ``send``.

    Raises:
        ValueError: ``peer`` is not another rank, or ``tag`` is out of range.
        MismatchError: Rank ``peer`` sent another dtype or number of elements.
    """
    world = world or current_world()
    buffer, peer, channel = _message(tensor, peer, tag, world)
    waits = algorithm.receive(buffer, peer, channel)
    return launch(waits, world, tensor, async_, device_of(buffer))


def _message(tensor: object, peer: int, tag: int, world: World) -> tuple[Buffer, int, Channel]:
    peer = integer(peer, "peer")
    if not 0 <= peer < world.size or peer == world.rank:
        raise ValueError(
            f"peer {peer} is not another rank than {world.rank} in a world of {world.size}"
        )
    channel = MessageChannel(world, world.tags.of_user(integer(tag, "tag")))
    return flat(tensor, any_dtype=True), peer, channel
