"""GPU memory that the ranks of a node have mapped: windows through CUDA IPC."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mpiddl.base.log import logger
from mpiddl.comm.layout import exchange
from mpiddl.comm.windows import refuse_other_sizes
from mpiddl.comm.world import World
from mpiddl.devices.base import Buffer, as_dtype
from mpiddl.devices.cuda.runtime import Runtime
from mpiddl.errors import GpuMemoryError

__all__ = ["CudaWindows"]

GRANULE = 2 << 20
"""CUDA cuts smaller allocations out of blocks of this size, and IPC would map the whole block."""


class _Owner:
    """Lives as long as any view of a rank's own part."""


@dataclass
class _Part:
    """A window as this process sees it.

    Attributes:
        addresses: Of every local rank's part; this rank's alone where peers cannot be mapped.
        nbytes: Of each.
        owner: Dead once no view of this rank's part is left.
    """

    addresses: dict[int, int]
    nbytes: int
    owner: weakref.ref[_Owner]


class CudaWindows:
    """Makes the windows of one world on one GPU, and finds them again by address.

    Memory that other processes have mapped must not be freed before they let go of it (CUDA leaves
    open what happens then). So windows without views are freed when the next one is made: all ranks
    are there then. At the end of the process the driver takes all back.

    Args:
        runtime: The GPU.
        world: Every rank of it must make the same windows.
    """

    def __init__(self, runtime: Runtime, world: World) -> None:
        self._runtime = runtime
        self._comm, self._node = world.comms
        self._rank, self._node_rank, self._size = world.rank, world.layout.place, world.local_size
        self._made = 0
        self._known: dict[int, _Part] = {}
        self._starts: list[tuple[int, int]] = []  # addresses of own parts, ascending; number
        self._warned = False

    def allocate(self, nbytes: int) -> torch.Tensor:
        """This rank's part of a new window, as bytes. Collective over the world.

        Where some rank cannot map its peers' parts, the memory is as good for messages: ``find``
        knows it on no rank.

        Raises:
            MismatchError: On every rank, if ranks ask for different sizes.
            GpuMemoryError: On every rank, if one of them has not so much.
        """
        refuse_other_sizes(self._comm, nbytes, "GPU memory")
        self._free_unused()
        part_bytes = max(1, -(-nbytes // GRANULE)) * GRANULE
        own = self._allocate_everywhere(part_bytes)
        addresses, problem = self._map(own)
        problems = [text for text in exchange(self._comm, problem) if text is not None]
        if problems:
            self._let_go(addresses)
            exchange(self._comm, None)  # nobody frees before all have let go
            addresses = {self._node_rank: own}
            self._warn(problems[0])
        owner = _Owner()
        self._made += 1
        self._known[self._made] = _Part(addresses, part_bytes, weakref.ref(owner))
        if not problems:
            self._starts.append((own, self._made))
            self._starts.sort()
        tensor = self._runtime.as_tensor(own, part_bytes, owner)
        self._place = tensor.device
        return tensor

    def close(self) -> None:
        """Free what nobody has a view of; the world closes. Collective."""
        if self._made:
            self._free_unused()

    def _allocate_everywhere(self, nbytes: int) -> int:
        own, problem = 0, None
        try:
            own = self._runtime.malloc(nbytes)
        except GpuMemoryError as error:
            problem = str(error)
        for rank, text in enumerate(exchange(self._comm, problem)):
            if text is not None:
                if own:
                    self._runtime.free(own)
                raise GpuMemoryError(f"rank {rank}: {text}")
        return own

    def _map(self, own: int) -> tuple[dict[int, int], str | None]:
        """Addresses here of all local ranks' parts, as far as it went, and what went wrong."""
        addresses, handle, problem = {self._node_rank: own}, None, None
        try:
            handle = self._runtime.export(own).hex() if self._size > 1 else None
        except OSError as error:
            problem = f"rank {self._rank}: memory cannot be exported: {error}"
        for peer, text in enumerate(exchange(self._node, handle)):
            if peer == self._node_rank or text is None:
                continue
            try:
                addresses[peer] = self._runtime.open(bytes.fromhex(text))
            except OSError as error:
                problem = f"rank {self._rank}: that of local rank {peer} cannot be mapped: {error}"
        return addresses, problem

    def _let_go(self, addresses: Mapping[int, int]) -> None:
        for peer, address in addresses.items():
            if peer != self._node_rank:
                self._runtime.close(address)

    def _free_unused(self) -> None:
        mine = [number for number, part in self._known.items() if part.owner() is None]
        everyones = exchange(self._comm, mine)
        unused = [number for number in mine if all(number in theirs for theirs in everyones)]
        for number in unused:
            self._let_go(self._known[number].addresses)
        exchange(self._comm, None)  # nobody frees before all have let go
        for number in unused:
            self._runtime.free(self._known.pop(number).addresses[self._node_rank])
        self._starts = [pair for pair in self._starts if pair[1] not in unused]

    def _warn(self, problem: str) -> None:
        if not self._warned and self._rank == 0:
            logger.warning(
                "GPU memory is not shared within a node (%s): gradients travel as messages, which "
                "is slower. Let every rank see all GPUs of its node (Slurm: --gpu-bind=none), and "
                "see `mpiddl doctor`",
                problem,
            )
        self._warned = True

    def find(self, address: int) -> tuple[int, int]:
        at = bisect_right(self._starts, (address, self._made)) - 1
        if at >= 0:
            start, number = self._starts[at]
            part = self._known[number]
            if address - start < part.nbytes and part.owner() is not None:
                return number, address - start
        return 0, 0

    def views(
        self, number: int, offsets: Sequence[int], length: int, dtype: torch.dtype
    ) -> list[Buffer]:
        nbytes = length * dtype.itemsize
        if nbytes == 0:
            return [torch.empty(0, dtype=dtype, device=self._place) for _ in offsets]
        addresses = self._known[number].addresses
        return [
            as_dtype(self._runtime.as_tensor(addresses[peer] + offset, nbytes, None), dtype)
            for peer, offset in enumerate(offsets)
        ]
