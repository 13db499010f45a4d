"""Small objects between ranks, as JSON: nothing that arrives is ever executed or unpickled."""

from __future__ import annotations

import json
from typing import Any

import numpy
import torch

from mpiddl.base.waits import AllOf, Waits
from mpiddl.collectives.broadcast import broadcast
from mpiddl.collectives.channel import Channel

__all__ = ["broadcast_json", "gather_json"]

CHUNK_BYTES = 1 << 20


def _bytes(length: int) -> torch.Tensor:
    return torch.empty(length, dtype=torch.uint8, device="cpu")  # whatever the default device is


def _encode(value: Any) -> torch.Tensor:
    return torch.from_numpy(numpy.frombuffer(bytearray(json.dumps(value).encode()), numpy.uint8))


def _decode(text: torch.Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


def broadcast_json(value: Any, root: int, channel: Channel) -> Waits[Any]:
    """Rank ``root``'s value on every rank."""
    mine = channel.rank == root
    text = _encode(value) if mine else _bytes(0)
    length = torch.tensor([len(text)], device="cpu")
    yield from broadcast(length, root, channel, CHUNK_BYTES)
    if not mine:
        text = _bytes(int(length))
    yield from broadcast(text, root, channel, CHUNK_BYTES)
    return _decode(text)


def gather_json(value: Any, root: int | None, channel: Channel) -> Waits[list[Any] | None]:
    """Every rank's value in rank order, on rank ``root`` (None elsewhere) or, for None, on all."""
    hub = root or 0
    text = _encode(value)
    if channel.rank != hub:
        length = torch.tensor([len(text)], device="cpu")
        yield AllOf([channel.send(length, hub), channel.send(text, hub)])
        if root is None:
            return list((yield from broadcast_json(None, hub, channel)))
        return None
    peers = [peer for peer in range(channel.size) if peer != hub]
    lengths = torch.zeros(channel.size, dtype=torch.int64, device="cpu")
    yield AllOf(channel.receive(lengths[peer : peer + 1], peer) for peer in peers)
    texts = [_bytes(int(length)) for length in lengths]
    yield AllOf(channel.receive(texts[peer], peer) for peer in peers)
    texts[hub] = text
    values = [_decode(text) for text in texts]
    if root is None:
        yield from broadcast_json(values, hub, channel)
    return values
