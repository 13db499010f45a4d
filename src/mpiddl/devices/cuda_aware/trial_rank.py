"""One rank of the test whether an MPI library reads GPU memory; ``trial`` starts it.

A program of its own, for a library that cannot does not say so: it crashes, or hangs. Rank 0 writes
one line per size that arrived; what is not written did not. The lines go to a file: launchers lose
some of what a rank printed just before the job is aborted.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpiddl.launch import library
from mpiddl.launch.launchers import read_launch

__all__ = ["SIZES", "main"]

SIZES = (1, 4 << 10, 64 << 10, 1 << 20, 64 << 20)
"""Bytes. MPI libraries take another path to GPU memory for small, middle and large messages."""

ROUNDS = 2  # the first message may go another way than later ones
PERIOD = 251  # a prime: what arrives at a wrong place is not what belongs there

_LEFT_BEHIND = re.compile(r"/dev/shm/mpich_shm_\w+")  # noqa: S108 - by an MPICH that was killed

Bytes = npt.NDArray[np.uint8]


class _Memory(Protocol):
    address: int

    def write(self, data: Bytes) -> None: ...

    def read(self, nbytes: int) -> Bytes: ...


class _HostMemory:
    """For tests of everything but the GPU."""

    def __init__(self, nbytes: int) -> None:
        self._array = np.empty(nbytes, np.uint8)
        self.address = self._array.ctypes.data

    def write(self, data: Bytes) -> None:
        self._array[: len(data)] = data

    def read(self, nbytes: int) -> Bytes:
        copy: Bytes = self._array[:nbytes].copy()
        return copy


class _GpuMemory:
    """Plain cudaMalloc memory of the current device, as buckets are."""

    def __init__(self, nbytes: int) -> None:
        import cupy

        self._api: Any = cupy.cuda.runtime
        self._memory: Any = cupy.cuda.Memory(nbytes)
        self.address = int(self._memory.ptr)

    def write(self, data: Bytes) -> None:
        kind = self._api.memcpyHostToDevice
        self._api.memcpy(self.address, data.ctypes.data, data.nbytes, kind)
        self._api.streamSynchronize(0)  # a copy from pageable memory may return before it is done

    def read(self, nbytes: int) -> Bytes:
        data = np.empty(nbytes, np.uint8)
        kind = self._api.memcpyDeviceToHost
        self._api.memcpy(data.ctypes.data, self.address, nbytes, kind)
        return data


def main(arguments: Sequence[str] | None = None) -> None:
    """Exchange buffers of all sizes with the other rank, or with oneself if there is none."""
    options = _parser().parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is an answer
    # Ends this process wherever it hangs, also when the parent is no longer there to do so.
    signal.alarm(options.limit)
    problem: Exception | None = None
    try:
        outgoing, incoming = _allocate(options), _allocate(options)
    except Exception as error:  # said below: the other rank is in MPI_Init, and would wait there
        problem = error
    MPI = library.load(read_launch())
    try:
        if problem is not None:
            raise problem
        _exchange_all(MPI, options, outgoing, incoming)
    except Exception as error:
        reason = " ".join(str(error).split())
        _say(options, f"failed {type(error).__name__}: {reason}")
        MPI.COMM_WORLD.Abort(1)
    MPI.Finalize()  # while the memory is still there: MPI may have mapped or registered it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--report", default=os.devnull, help="file for the lines")
    parser.add_argument("--limit", type=int, default=60, help="seconds that this process may live")
    # For tests of the test.
    parser.add_argument("--host-memory", action="store_true", help=argparse.SUPPRESS)
    for mishap in ("crash", "hang", "garble"):
        parser.add_argument(f"--{mishap}-at", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _allocate(options: argparse.Namespace) -> _Memory:
    if options.host_memory:
        return _HostMemory(SIZES[-1])
    import cupy

    # Before MPI is started: some libraries open the device that is the current one then.
    cupy.cuda.Device(options.device).use()
    return _GpuMemory(SIZES[-1])


def _exchange_all(
    mpi: ModuleType, options: argparse.Namespace, outgoing: _Memory, incoming: _Memory
) -> None:
    rank, size = mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()
    if size != options.ranks:
        raise RuntimeError(f"{size} of {options.ranks} ranks are in one world")
    mpi.COMM_WORLD.Barrier()
    if rank == 0:
        for file in sorted(set(_LEFT_BEHIND.findall(Path("/proc/self/maps").read_text()))):
            _say(options, f"uses {file}")
        _say(options, "ready")
    for nbytes in SIZES:
        if rank == size - 1:
            _mishap(options, nbytes)
        for number in range(ROUNDS):
            garble = nbytes == options.garble_at and rank == size - 1
            _exchange(mpi, outgoing, incoming, nbytes, number, garble)
        mpi.COMM_WORLD.Barrier()
        if rank == 0:
            _say(options, f"passed {nbytes}")


def _exchange(
    mpi: ModuleType, outgoing: _Memory, incoming: _Memory, nbytes: int, number: int, garble: bool
) -> None:
    """Both directions at once, as in a ring.

    Raises:
        RuntimeError: What arrived is not what was sent.
    """
    comm = mpi.COMM_WORLD
    rank = comm.Get_rank()
    peer = comm.Get_size() - 1 - rank
    outgoing.write(_pattern(rank, number, nbytes))
    expected = _pattern(peer, number, nbytes)
    incoming.write(~expected)
    requests = [
        comm.Irecv([mpi.memory.fromaddress(incoming.address, nbytes), mpi.BYTE], peer, number),
        comm.Isend([mpi.memory.fromaddress(outgoing.address, nbytes), mpi.BYTE], peer, number),
    ]
    mpi.Request.Waitall(requests)
    received = incoming.read(nbytes)
    if garble:
        received[-1] += 1
    wrong = int(np.count_nonzero(received != expected))
    if wrong:
        raise RuntimeError(f"{wrong} of {nbytes} bytes arrived wrong")


def _pattern(rank: int, number: int, nbytes: int) -> Bytes:
    """What ``rank`` sends in a round."""
    period = np.arange(PERIOD, dtype=np.uint8) + np.uint8(1 + rank + 2 * number)
    return np.resize(period, nbytes)


def _mishap(options: argparse.Namespace, nbytes: int) -> None:
    if nbytes == options.crash_at:
        os.kill(os.getpid(), signal.SIGSEGV)
    if nbytes == options.hang_at:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a library that does not return
        while True:
            time.sleep(1)


def _say(options: argparse.Namespace, text: str) -> None:
    """In one piece: both ranks may write."""
    handle = os.open(options.report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, f"{text}\n".encode())
    os.close(handle)


if __name__ == "__main__":
    main()
