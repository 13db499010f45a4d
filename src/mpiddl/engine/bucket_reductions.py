"""How the buckets of one model are reduced: each with its own messages, lane and algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpiddl.base.waits import ALREADY, Queue, Wait, Waits, in_turn
from mpiddl.collectives.channel import Channel, MessageChannel
from mpiddl.collectives.choose import ALGORITHMS, Chosen, choose
from mpiddl.collectives.nccl import make_communicator
from mpiddl.collectives.node.lane import Lane
from mpiddl.collectives.node.lanes import is_mapped, kept_lanes
from mpiddl.collectives.reduction import Reduction
from mpiddl.comm.messages import Credits
from mpiddl.comm.native import Native
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.host import HOST
from mpiddl.devices.registry import device_of
from mpiddl.engine.engine import engine_of
from mpiddl.engine.work import Label, Work
from mpiddl.gradients.bucket import Bucket

__all__ = ["BucketReductions"]

FURTHER_SENDS = 4
"""Messages in flight beyond the first of each bucket: enough to keep a link busy, and few enough
for an urgent bucket to overtake a large one in the middle."""

Hook = Callable[[Bucket, float], Waits[None]]
"""Exchanges a bucket, in which this rank has a weight, in place of the all-reduce."""


class BucketReductions:
    """Starts the all-reduce of each bucket. Buckets may become ready in any order on any rank.

    Args:
        world: The ranks.
        algorithm: Name of the all-reduce algorithm, or ``"auto"``.
        model: Number of the model, in events.

    Attributes:
        device: The device that the buckets are on.
        ordered: Buckets must be started in plan order, since a library runs their all-reduce.
        threaded: Whether the engine's thread drives them.
    """

    def __init__(self, world: World, algorithm: str, model: int) -> None:
        self.world = world
        self.device: Device = HOST
        self.ordered = False
        self.threaded = False
        self.hook: Hook | None = None
        self._algorithm = algorithm
        self._model = model
        self._engine = engine_of(world)
        self._credits = Credits(FURTHER_SENDS)
        self._turns = Queue()  # of hooks that begin what a library runs
        self._native: Native | None = None
        self._tags: list[int] = []
        self._lanes: list[Lane] | list[None] = []
        self._chosen: list[Chosen] = []
        self._channels: list[Channel] = []

    def reserve(self, count: int, device: Device) -> None:
        """Make ready for so many buckets; those in flight are not touched. Collective.

        Raises:
            TagError: There are too many.
        """
        more = count - len(self._tags)
        if more > 0:
            self._tags += self.world.tags.keep(more)
            self._lanes = kept_lanes(self.world, count)
        names = {self._algorithm, *(choice.algorithm for choice in self.world.tuned)}
        if any(ALGORITHMS[name].ordered for name in names if name in ALGORITHMS):
            self._native = self.world.bucket_native
        if "nccl" in names:
            make_communicator(self.world.bucket_native, device, self.world)

    def fit(self, buckets: Sequence[Bucket], device: Device) -> None:
        """Reduce these buckets from now on; there is room for as many, and none is in flight.

        Raises:
            UnsupportedBufferError: The algorithm cannot reduce one of them.
        """
        self.device = device
        self._chosen = [self._choose(self._algorithm, bucket.buffer) for bucket in buckets]
        self.ordered = any(chosen.algorithm.ordered for chosen in self._chosen)
        self._channels = [
            MessageChannel(self.world, tag, self._native, lane, self._credits, number)
            for number, (tag, lane) in enumerate(zip(self._tags, self._lanes, strict=True))
        ]

    def start(self, bucket: Bucket, weight: float) -> Work:
        """Start the all-reduce of ``bucket``, in which this rank's gradients weigh ``weight``."""
        self.world.check_open()
        after = self._written(bucket) if self.device.late else ALREADY
        if self.hook is not None:
            waits = self.hook(bucket, 1.0 if self.world.size == 1 else weight)
            if self.ordered:
                waits = in_turn(self._turns, waits)
        elif self._alone:
            waits = _nothing()
        else:
            waits = self.all_reduce(bucket.number, bucket.buffer, weight)
        # The parameters that backward reaches last are those that the next forward needs first. But
        # what a library runs must begin in the order in which it was submitted.
        return self._engine.submit(
            self._in_line(bucket.number, waits),
            self.world,
            priority=0 if self.ordered else bucket.number,
            threaded=self.threaded,
            label=Label(self._model, bucket.number, bucket.buffer.nbytes),
            after=after,
        )

    def _written(self, bucket: Bucket) -> Wait:
        """Done when its gradients are there, whatever streams they came on."""
        if self._alone:
            return ALREADY
        # This stream too: it may have brought gradients in at the end.
        return self.device.settled({*bucket.callers, self.device.caller()})

    @property
    def _alone(self) -> bool:
        """Gradients stay as they are: nobody needs to wait for a GPU."""
        return self.world.size == 1 and self.hook is None

    def _in_line(self, number: int, waits: Waits[None]) -> Waits[None]:
        """While ``waits`` runs, buckets of lower numbers stand back."""
        self._credits.enter(number)
        try:
            yield from waits
        finally:
            self._credits.leave(number)

    def all_reduce(
        self, number: int, buffer: Buffer, weight: float | None, algorithm: str | None = None
    ) -> Waits[None]:
        """Sum any ``buffer`` over ranks with the messages of bucket ``number``."""
        chosen, device = self._chosen[number], device_of(buffer)
        elsewhere = device.late and chosen.algorithm.reach and not self._is_mapped(buffer)
        if algorithm is not None or buffer.dtype not in chosen.algorithm.dtypes or elsewhere:
            chosen = self._choose(algorithm or self._algorithm, buffer)
        return chosen.run(buffer, Reduction("sum", weight), self._channels[number], device)

    def channel_of(self, number: int) -> Channel:
        """The messages of bucket ``number``."""
        return self._channels[number]

    def _choose(self, algorithm: str, buffer: Buffer) -> Chosen:
        return choose(
            algorithm,
            buffer.dtype,
            buffer.nbytes,
            self.world,
            lanes=None not in self._lanes,
            device=device_of(buffer),
            mapped=self._is_mapped(buffer),
        )

    def _is_mapped(self, buffer: Buffer) -> bool:
        return is_mapped(buffer, device_of(buffer), self.world)

    @property
    def tags(self) -> Sequence[int]:
        """The tags of the buckets' messages, in plan order."""
        return self._tags

    def close(self) -> None:
        """Others may use the tags. Every rank does this at the same place in its program."""
        self.world.tags.give_back(self._tags)
        self._tags, self._lanes, self._channels = [], [], []


def _nothing() -> Waits[None]:
    yield from ()
