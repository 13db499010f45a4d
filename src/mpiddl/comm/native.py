"""The installed MPI's own collectives, on host memory and the dtypes it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpiddl.comm.messages import RequestWait
from mpiddl.waits import Wait

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
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm.Dup()
        self.free = self._comm.Free

    def all_reduce(self, address: int, nbytes: int, dtype: str, op: str) -> Wait:
        """MPI_Iallreduce in place on ``nbytes`` (below 2**31) at ``address``."""
        from mpi4py import MPI

        memory = MPI.memory.fromaddress(address, nbytes)
        datatype = getattr(MPI, NATIVE_DTYPES[dtype])
        operation = getattr(MPI, NATIVE_OPS[op])
        return RequestWait(self._comm.Iallreduce(MPI.IN_PLACE, [memory, datatype], operation))

    def blocking(
        self, collective: str, send: tuple[int, int], receive: tuple[int, int], dtype: str, op: str
    ) -> None:
        """One of the library's blocking collectives, which no generator can use: for comparison.

        Args:
            collective: all-reduce or broadcast, in place on ``receive``; reduce-scatter,
                all-gather or all-to-all, in equal parts. A broadcast comes from rank 0.
            send: Address and bytes of the input.
            receive: Address and bytes of the output.
            dtype: One of NATIVE_DTYPES; for those that only move, any.
            op: One of NATIVE_OPS.
        """
        from mpi4py import MPI

        source, target = (MPI.memory.fromaddress(*memory) for memory in (send, receive))
        if collective == "broadcast":
            self._comm.Bcast([target, MPI.BYTE], 0)
        elif collective == "all-gather":
            self._comm.Allgather([source, MPI.BYTE], [target, MPI.BYTE])
        elif collective == "all-to-all":
            self._comm.Alltoall([source, MPI.BYTE], [target, MPI.BYTE])
        else:
            datatype = getattr(MPI, NATIVE_DTYPES[dtype])
            operation = getattr(MPI, NATIVE_OPS[op])
            if collective == "all-reduce":
                self._comm.Allreduce(MPI.IN_PLACE, [target, datatype], operation)
            else:
                pair = [source, datatype], [target, datatype]
                self._comm.Reduce_scatter_block(*pair, operation)
