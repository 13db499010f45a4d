"""Kernels that take their time."""

from __future__ import annotations

import torch

CYCLES = 10_000_000
"""Some 6 ms: messages take less."""


def written_late(tensor, cycles=CYCLES):
    """What ``tensor`` holds now it will hold a little later, on the current stream; until then it
    holds something else."""
    value = tensor.clone()
    tensor.fill_(77)
    torch.cuda._sleep(cycles)
    tensor.copy_(value)


def stream_after_this():
    """A new stream, in line with the present one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream
