"""The installed MPI's own all-reduce, for comparison: host memory, the dtypes MPI knows.

A GPU's memory is copied to the host and back: MPI's own reductions of it copy too, or crash.
"""

from __future__ import annotations

from mpiddl.base.segments import chunked
from mpiddl.base.waits import AllOf, Wait, Waits
from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.host import HOST

__all__ = ["library_all_reduce"]

LARGEST_PIECE = 1 << 27  # elements: at most 2**30 bytes


def library_all_reduce(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, chunk_bytes: int
) -> Waits[None]:
    """Reduce ``buffer`` over all ranks, in place, with MPI_Iallreduce.

    Must be started in the same order on every rank. A blocking MPI_Allreduce is faster on some
    libraries; a generator cannot use it. How NaN takes part in min and max, and in
    which order sums are formed, is the MPI library's choice. ``chunk_bytes`` is not used.
    """
    if not device.late:
        return _on_host(buffer, reduction, channel)
    # At once: ranks begin in the order of their calls, and what is waited for takes its time.
    return _through_host(buffer, reduction, channel, device, channel.native.queue.ticket())


def _on_host(buffer: Buffer, reduction: Reduction, channel: Channel) -> Waits[None]:
    if reduction.weight is not None:
        HOST.scale(buffer, reduction.weight)
    yield _started(buffer, reduction.op, channel)


def _through_host(
    buffer: Buffer, reduction: Reduction, channel: Channel, device: Device, ticket: Wait
) -> Waits[None]:
    if reduction.weight is not None:
        device.scale(buffer, reduction.weight)
    with HOST.scratch(len(buffer), buffer.dtype) as copy:
        device.copy(copy, buffer)
        yield device.fence()
        yield ticket
        reduced = _started(copy, reduction.op, channel)
        channel.native.queue.leave()
        yield reduced
        device.copy(buffer, copy)
        yield device.fence()


def _started(buffer: Buffer, op: str, channel: Channel) -> Wait:
    dtype = str(buffer.dtype).removeprefix("torch.")
    pieces = [buffer[part] for part in chunked(slice(0, len(buffer)), LARGEST_PIECE)]
    # All pieces start at once: whatever else uses this communicator comes before or after them.
    return AllOf(
        channel.native.all_reduce(piece.data_ptr(), piece.nbytes, dtype, op, piece)
        for piece in pieces
    )
