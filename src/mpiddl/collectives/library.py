"""The installed MPI's own all-reduce, for comparison: host memory, the dtypes MPI knows."""

from __future__ import annotations

from mpiddl.collectives.channel import Channel
from mpiddl.collectives.reduction import Reduction
from mpiddl.devices.base import Buffer, Device
from mpiddl.segments import chunked
from mpiddl.waits import AllOf, Waits

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
    if reduction.weight is not None:
        device.scale(buffer, reduction.weight)
    dtype = str(buffer.dtype).removeprefix("torch.")
    pieces = [buffer[part] for part in chunked(slice(0, len(buffer)), LARGEST_PIECE)]
    # All pieces start at once: whatever else uses this communicator comes before or after them.
    yield AllOf(
        channel.native.all_reduce(piece.data_ptr(), piece.nbytes, dtype, reduction.op)
        for piece in pieces
    )
