"""Reading and writing the memory of another rank on the same node, in one copy, by the kernel.

Linux's cross-memory attach; MPI libraries use it for large messages too. A container or a
security module may forbid it, so it is tried before it is used.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpiddl.comm.layout import exchange

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Reach", "find_reach"]

TOKEN_BYTES = 16
PR_SET_PTRACER, ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


class Reach:
    """The memory of the other ranks of this node.

    Args:
        processes: Process number of each rank of the node.
        libc: The C library.
    """

    def __init__(self, processes: list[int], libc: Any) -> None:
        self._processes = processes
        self._read = _prototype(libc.process_vm_readv)
        self._write = _prototype(libc.process_vm_writev)

    def read(self, address: int, nbytes: int, peer: int, peer_address: int) -> None:
        """Copy from local rank ``peer``'s memory to ``address``.

        Raises:
            OSError: That rank is gone, or has no such memory.
        """
        self._copy(self._read, address, nbytes, peer, peer_address)

    def write(self, address: int, nbytes: int, peer: int, peer_address: int) -> None:
        """Copy from ``address`` to local rank ``peer``'s memory; raises as ``read``."""
        self._copy(self._write, address, nbytes, peer, peer_address)

    def _copy(
        self, call: Callable[..., int], address: int, nbytes: int, peer: int, peer_address: int
    ) -> None:
        done = 0
        while done < nbytes:
            own = _Span(address + done, nbytes - done)
            other = _Span(peer_address + done, nbytes - done)
            moved = call(self._processes[peer], own, 1, other, 1, 0)
            if moved <= 0:
                number = ctypes.get_errno()
                raise OSError(number, f"memory of local rank {peer}: {os.strerror(number)}")
            done += moved


def _prototype(call: Any) -> Callable[..., int]:
    span = ctypes.POINTER(_Span)
    call.argtypes = (ctypes.c_int, span, ctypes.c_ulong, span, ctypes.c_ulong, ctypes.c_ulong)
    call.restype = ctypes.c_ssize_t
    reach: Callable[..., int] = call
    return reach


def find_reach(comm: MPI.Comm, node: MPI.Comm, wanted: bool) -> Reach | None:
    """The memory of the ranks of ``node``; None, on all of ``comm``, if one rank of any node
    cannot reach another. Collective over ``comm``.
    """
    token = ctypes.create_string_buffer(secrets.token_bytes(TOKEN_BYTES), TOKEN_BYTES)
    everyones = exchange(node, [os.getpid(), ctypes.addressof(token), token.raw.hex()])
    libc = ctypes.CDLL(None, use_errno=True)
    reach = None
    if wanted and hasattr(libc, "process_vm_readv"):
        # Where only ancestors may do this, the ranks, which are siblings, allow it.
        libc.prctl(PR_SET_PTRACER, ANY_PROCESS, 0, 0, 0)
        reach = Reach([process for process, _, _ in everyones], libc)
    node.Barrier()  # everyone has allowed it
    works = reach is not None and all(
        _reads(reach, peer, address, bytes.fromhex(expected))
        for peer, (_, address, expected) in enumerate(everyones)
    )
    return reach if all(exchange(comm, works)) else None  # nobody's token goes before


def _reads(reach: Reach, peer: int, address: int, expected: bytes) -> bool:
    """Whether ``peer`` is the process that it is taken for: in another container's process
    namespace its number may be somebody else's."""
    got = ctypes.create_string_buffer(TOKEN_BYTES)
    try:
        reach.read(ctypes.addressof(got), TOKEN_BYTES, peer, address)
    except OSError:
        return False
    return got.raw == expected
