"""The installed MPI's own collectives, on host memory and the dtypes it knows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpiddl.base.waits import Queue, Wait
from mpiddl.comm.messages import RequestWait

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["NATIVE_DTYPES", "NATIVE_OPS", "Native"]

# bfloat16 and float16 are missing on purpose: handed over as bytes, they are summed as bytes by
# some libraries, without an error.
NATIVE_DTYPES = {
    "float64": "DOUBLE",
    "float32": "FLOAT",
    "int64": "INT64_T",
    "int32": "INT32_T",
    "int16": "INT16_T",
    "int8": "INT8_T",
    "uint8": "UINT8_T",
}
NATIVE_OPS = {"sum": "SUM", "min": "MIN", "max": "MAX", "prod": "PROD"}


class Native:
    """The MPI library's collectives on a communicator of their own.

    They match by the order in which they are started, which must be the same on every rank.

    Attributes:
        queue: Of those that cannot start at once.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.queue = Queue()
        self._comm = comm.Dup()
        self.free = self._comm.Free

    def all_reduce(self, address: int, nbytes: int, dtype: str, op: str, owner: object) -> Wait:
        """MPI_Iallreduce in place on ``nbytes`` (below 2**31) of ``owner``'s memory at
        ``address``."""
        from mpi4py import MPI

        memory = MPI.memory.fromaddress(address, nbytes)
        datatype = getattr(MPI, NATIVE_DTYPES[dtype])
        operation = getattr(MPI, NATIVE_OPS[op])
        request = self._comm.Iallreduce(MPI.IN_PLACE, [memory, datatype], operation)
        return RequestWait(request, owner)

    def blocking(
        self, collective: str, send: tuple[int, int], receive: tuple[int, int], dtype: str, op: str
    ) -> Callable[[], None]:
        """One of the library's blocking collectives, which no generator can use: for comparison.

        Args:
            collective: all-reduce or broadcast, in place on ``receive``; reduce-scatter,
                all-gather or all-to-all, in equal parts. A broadcast comes from rank 0.
            send: Address and bytes of the input.
            receive: Address and bytes of the output.
            dtype: One of NATIVE_DTYPES; for those that only move, any.
            op: One of NATIVE_OPS.

        Returns:
            What runs it, with everything found out before.
        """
        from mpi4py import MPI

        comm = self._comm
        datatype = getattr(MPI, NATIVE_DTYPES.get(dtype, "BYTE"))
        operation = getattr(MPI, NATIVE_OPS.get(op, "SUM"))
        reduces = collective in ("all-reduce", "reduce-scatter")
        kind = datatype if reduces else MPI.BYTE
        source, target = ([MPI.memory.fromaddress(*memory), kind] for memory in (send, receive))
        calls: dict[str, Callable[[], None]] = {
            "all-reduce": functools.partial(comm.Allreduce, MPI.IN_PLACE, target, operation),
            "broadcast": functools.partial(comm.Bcast, target, 0),
            "reduce-scatter": functools.partial(
                comm.Reduce_scatter_block, source, target, operation
            ),
            "all-gather": functools.partial(comm.Allgather, source, target),
            "all-to-all": functools.partial(comm.Alltoall, source, target),
        }
        return calls[collective]
