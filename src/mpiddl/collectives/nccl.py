"""NVIDIA's own all-reduce, through CuPy: where each rank has a GPU to itself and NCCL is there.

NCCL's kernels wait for other ranks on the GPU, so ranks that share one would block each other.
"""

from __future__ import annotations

from typing import Any

from mpiddl.base.waits import Wait, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.comm.layout import exchange
from mpiddl.comm.native import Native
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.cuda.device import CudaDevice
from mpiddl.devices.cuda.streams import Events

__all__ = [
    "NCCL_DTYPES",
    "has_communicator",
    "make_communicator",
    "nccl_all_reduce",
    "nccl_missing",
    "nccl_problem",
]

NCCL_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8")


class _Communicator:
    """NCCL's, on a stream of its own: what it waits for must hold up nothing else.

    Attributes:
        under_way: What it works on. A buffer that was given up stays there, for NCCL goes on.
    """

    def __init__(self, device: CudaDevice, nccl: Any, known: Any) -> None:
        self._nccl = nccl
        self._known = known
        self._stream = device.runtime.make_stream()
        self._events = Events(device.runtime)
        self.under_way: dict[Wait, Buffer] = {}

    def all_reduce(self, buffer: Buffer, op: str) -> Wait:
        """In place; starts at once."""
        address, dtype = buffer.data_ptr(), str(buffer.dtype).removeprefix("torch.")
        kind, does = (getattr(self._nccl, f"NCCL_{name.upper()}") for name in (dtype, op))
        self._known.allReduce(address, address, len(buffer), kind, does, self._stream)
        done = self._events.after(self._stream)
        self.under_way[done] = buffer
        return done


class _Nccl:
    """NCCL among the ranks of one world.

    Attributes:
        problem: Why it cannot be used, as ranks found out together.
        communicators: One for each set of collectives that must start in one order.
    """

    def __init__(self, world: World) -> None:
        self.problem: str | None = None
        self.communicators: dict[Native, _Communicator] = {}


def nccl_problem(device: Device, world: World) -> str | None:
    """Why NCCL cannot be used, as far as that is known, the same on every rank; None if it can."""
    if not device.late:
        return "algorithm 'nccl' works on GPU memory; see `mpiddl doctor` for the GPUs of this node"
    if world.gpu_sharers > 1:
        return (
            f"algorithm 'nccl' needs a GPU for each rank, and up to {world.gpu_sharers} ranks "
            "share one; start one rank per GPU, or leave the algorithm to mpiddl"
        )
    return nccl_missing() if world.size == 1 else world.service(_Nccl).problem


def nccl_missing() -> str | None:
    """What this process lacks; None if it lacks nothing."""
    try:
        from cupy.cuda import nccl
    except ImportError:
        return "algorithm 'nccl' needs CuPy; pip install 'mpiddl[cuda13]' or [cuda12]"
    if not nccl.available:
        return "algorithm 'nccl' needs NCCL where CuPy finds it; pip install nvidia-nccl-cu13"
    return None


def has_communicator(native: Native, world: World) -> bool:
    """Whether ``make_communicator`` has made one."""
    return native in world.service(_Nccl).communicators


def make_communicator(native: Native, device: Device, world: World) -> None:
    """What the collectives on channels with ``native`` will use. Collective, at the first call; all
    ranks are there and nothing that others wait for is left to do.

    Where a rank cannot, none gets one, and ``nccl_problem`` says why on all. But ncclCommInitRank
    waits for all ranks itself: if it fails on one, others learn that when it gives up on them too.
    """
    if (
        has_communicator(native, world)
        or world.size == 1
        or nccl_problem(device, world) is not None
    ):
        return
    if _any_problem(nccl_missing(), world):
        return
    assert isinstance(device, CudaDevice)
    from cupy.cuda import nccl

    number = list(nccl.get_unique_id()) if world.rank == 0 else None
    number, problem = exchange(world.comms[0], number)[0], None
    try:
        with device.runtime.current():
            known = nccl.NcclCommunicator(world.size, bytes(number), world.rank)
    except nccl.NcclError as error:
        problem = f"NCCL could not be started: {error}"
    if not _any_problem(problem, world):
        world.service(_Nccl).communicators[native] = _Communicator(device, nccl, known)


def _any_problem(problem: str | None, world: World) -> bool:
    """Whether some rank has one. Collective; from then on ``nccl_problem`` is that."""
    for rank, text in enumerate(exchange(world.comms[0], problem)):
        if text is not None:
            world.service(_Nccl).problem = f"{text} (rank {rank})"
            return True
    return False


def nccl_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place, with ncclAllReduce.

    Must be started in the same order on every rank. How NaN takes part in min and max, in which
    order sums are formed and where 16-bit floats are rounded is NCCL's choice. ``chunk_bytes`` is
    not used.
    """
    # At once: ranks begin in the order of their calls, and what is waited for takes its time.
    return _when_served(buffer, reduction, channel, device, channel.native.queue.ticket())


def _when_served(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, ticket: Wait
) -> Waits[None]:
    if reduction.weight is not None:
        device.scale(buffer, reduction.weight)
    yield device.fence()
    yield ticket
    if channel.size == 1 or not len(buffer):
        channel.native.queue.leave()
        return
    communicator = channel.world.service(_Nccl).communicators[channel.native]
    reduced = communicator.all_reduce(buffer, reduction.op)
    channel.native.queue.leave()
    yield reduced
    del communicator.under_way[reduced]
