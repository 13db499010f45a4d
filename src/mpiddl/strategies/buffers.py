"""A model's buffers, such as BatchNorm's running statistics, become rank 0's."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from mpiddl.base.log import logger
from mpiddl.base.plain import gapless, overwrite
from mpiddl.base.waits import Waits
from mpiddl.collectives.broadcast import broadcast
from mpiddl.collectives.channel import Channel, bytes_of
from mpiddl.devices.base import Buffer, Device
from mpiddl.devices.registry import device_of
from mpiddl.engine.control import Control
from mpiddl.engine.work import Work
from mpiddl.gradients.state import why_not_plain

__all__ = ["BufferBroadcast"]

HEADER = struct.Struct("<QQ32s")
"""Bytes of all buffers, bytes of their description, and its digest."""


class _Placed(NamedTuple):
    """A buffer in the packed bytes.

    Attributes:
        name: Its name in ``named_buffers()``.
        dtype: Its dtype, for example ``"float32"``.
        shape: Its shape.
        strides: The strides of its elements among the packed bytes.
        nbytes: Its size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int

    def fits(self, target: torch.Tensor) -> bool:
        """Whether ``target`` can have its values."""
        return (self.dtype, list(self.shape)) == (_name_of(target.dtype), list(target.shape))


class BufferBroadcast:
    """Copies rank 0's buffers to all ranks, packed, in the background.

    At the end of backward, which every rank reaches, and not before forward, which a rank
    without samples leaves out: evaluation on one rank alone waits for nobody.

    Ranks may have other buffers than rank 0, or some of another size: caches that grow with the
    longest sequence seen, or are made when they are needed first. Those stay a rank's own. So a
    header goes first, and the names and shapes of rank 0's whenever they have changed.

    Args:
        module: It has buffers on every rank, or on none. They may be replaced.
        control: Carries them.
    """

    def __init__(self, module: torch.nn.Module, control: Control) -> None:
        self._module = module
        self._control = control
        self._work: Work | None = None
        self._place = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._active = control.size > 1 and any(True for _ in module.buffers())
        self._warned: set[str] = set()
        self._targets: dict[str, torch.Tensor] = {}
        self._seen: Sequence[tuple[object, ...]] = []  # the targets, as they were described last
        self._own: list[_Placed] = []
        self._own_digest = b""
        self._roots: list[_Placed] = []  # rank 0's, as it described them last
        self._roots_digest = b""
        self._mine = False
        self._packed = torch.empty(0, dtype=torch.uint8, device=self._place)

    def start(self, root: int = 0) -> None:
        """Take rank ``root``'s as they are now."""
        if not self._active:
            return
        self._targets = dict(self._module.named_buffers())
        self._describe()
        pieces = [bytes_of(gapless(self._targets[placed.name])) for placed in self._own]
        with torch.no_grad():
            self._packed = torch.cat(pieces) if pieces else self._packed[:0]
        self._mine = root == self._control.rank
        device = device_of(self._packed)
        exchange = functools.partial(self._exchange, root, device)
        self._work = self._control.in_background(exchange, device)

    def _describe(self) -> None:
        """Note where this rank's buffers are among the packed bytes."""
        seen = [
            (name, buffer.dtype, buffer.device, buffer.layout, buffer.shape, _strides(buffer))
            for name, buffer in self._targets.items()
        ]
        if seen == self._seen:
            return
        self._seen, self._own = seen, []
        for name, buffer in self._targets.items():
            reason = why_not_plain(buffer)
            problem = reason and reason.problem
            if problem is None and buffer.device != self._place:
                problem = f"on {buffer.device}, not on {self._place}"
            if problem is not None:
                self._warn(name, f"is {problem}")
            elif buffer.numel():
                shape, strides = tuple(buffer.shape), gapless(buffer).stride()
                nbytes = buffer.numel() * buffer.itemsize
                self._own.append(_Placed(name, _name_of(buffer.dtype), shape, strides, nbytes))
        self._own_digest = hashlib.sha256(_as_text(self._own)).digest()

    def _exchange(
        self, root: int, device: Device, channel: Channel, chunk_bytes: int
    ) -> Waits[None]:
        # What is made here is used in other modes too.
        with torch.inference_mode(mode=False), torch.no_grad():
            text = _as_text(self._own) if self._own_digest != self._roots_digest else b""
            header = _buffer_of(HEADER.pack(len(self._packed), len(text), self._own_digest))
        yield from broadcast(header, root, channel, chunk_bytes)
        length, text_length, digest = HEADER.unpack(bytes(header.numpy()))
        if text_length:
            with torch.inference_mode(mode=False), torch.no_grad():
                told = _buffer_of(text if self._mine else bytes(text_length))
            yield from broadcast(told, root, channel, chunk_bytes)
            self._roots = [_Placed(*fields) for fields in json.loads(bytes(told.numpy()))]
            self._roots_digest = digest
        if len(self._packed) != length:
            with torch.inference_mode(mode=False), torch.no_grad(), device.stream():
                self._packed = torch.empty(length, dtype=torch.uint8, device=self._place)
        yield from broadcast(self._packed, root, channel, chunk_bytes)

    def finish(self) -> None:
        """Wait for them; nothing, if none were started."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        if self._mine:  # and may have changed since
            return
        memories = torch.split(self._packed, [placed.nbytes for placed in self._roots])
        unchanged = set(self._targets)
        with torch.no_grad():
            for placed, memory in zip(self._roots, memories, strict=True):
                target = self._targets.get(placed.name)
                if target is not None and placed.fits(target):
                    _put(target, memory, placed.strides)
                    unchanged.discard(placed.name)
        if self._own_digest != self._roots_digest:
            self._warn_of(unchanged)

    def _warn_of(self, names: Collection[str]) -> None:
        """Caches are a rank's own, and not in checkpoints. Of others somebody should know."""
        roots = {placed.name: placed for placed in self._roots}
        for name in sorted(names):
            path, _, own = name.rpartition(".")
            buffer = self._targets[name]
            if (
                buffer.numel()
                and own not in self._module.get_submodule(path)._non_persistent_buffers_set
            ):
                there = f"{roots[name].dtype}{list(roots[name].shape)}" if name in roots else "not"
                here = f"{_name_of(buffer.dtype)}{list(buffer.shape)}"
                self._warn(name, f"is {here} on rank {self._control.rank}, and {there} on rank 0")

    def _warn(self, name: str, why: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "buffer %r %s: each rank keeps its own. Register it with persistent=False if it "
                "is a cache, else give it one shape on all ranks",
                name,
                why,
            )


def _put(target: torch.Tensor, memory: Buffer, strides: tuple[int, ...]) -> None:
    """Write the values that ``memory`` holds in the order of ``strides``."""
    plain = gapless(target)
    if plain.data_ptr() == target.data_ptr() and plain.stride() == strides:
        bytes_of(plain).copy_(memory)
        return
    values = memory.clone().view(target.dtype).as_strided(target.shape, strides)
    overwrite(target, values)


def _as_text(placed: Sequence[_Placed]) -> bytes:
    return json.dumps(placed).encode()


def _buffer_of(data: bytes) -> Buffer:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _strides(buffer: torch.Tensor) -> tuple[int, ...]:
    return buffer.stride() if buffer.layout is torch.strided else ()
