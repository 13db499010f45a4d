"""More elements than a 32-bit count can say: MPI's own counts end there."""

from __future__ import annotations

import mmap

import psutil
import pytest
import torch

import mpiddl

LENGTH = (1 << 31) + 3
PLACES = [0, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, LENGTH - 1]
"""Around the ends of messages, of 32-bit counts, and of the buffer."""


@pytest.fixture
def pair(world):
    """The first and the last rank; None elsewhere."""
    if world.size == 1:
        pytest.skip("one rank has nobody to exchange with")
    free = min(mpiddl.gather_json(psutil.virtual_memory().available))
    if free < 5 * LENGTH:
        pytest.skip(f"needs {5 * LENGTH >> 30} GiB of free memory, there are {free >> 30}")
    group = world.split(0 if world.rank in (0, world.size - 1) else None)
    yield group
    if group is not None:
        group.close()


def zeros():
    """Bytes that take no memory before they are written."""
    return torch.frombuffer(mmap.mmap(-1, LENGTH), dtype=torch.uint8)


def marked(values):
    buffer = zeros()
    for place, value in zip(PLACES, values, strict=True):
        buffer[place] = value
    return buffer


def holds(buffer, values):
    """All marks, and nothing but them. (Counted a part at a time: it would take 8 bytes each.)"""
    counted = sum(int(part.count_nonzero()) for part in buffer.split(1 << 26))
    return [int(buffer[place]) for place in PLACES] == values and counted == len(PLACES)


MARKS = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["send", "broadcast", "reduce"])
def test_more_elements_than_2_to_the_31(agree, pair, name):
    """Between two ranks; one of them only reads, so that its zeros stay unwritten."""
    right = True
    if pair is not None:
        first = pair.rank == 0
        if name == "send":
            buffer = marked(MARKS) if first else zeros()
            if first:
                mpiddl.send(buffer, 1, world=pair)
            else:
                mpiddl.recv(buffer, 0, world=pair)
        elif name == "broadcast":
            buffer = marked(MARKS) if first else zeros()
            mpiddl.broadcast(buffer, 0, world=pair)
        else:
            buffer = marked(MARKS)
            mpiddl.reduce(buffer, "sum", root=1, world=pair)
        want = [2 * mark for mark in MARKS] if name == "reduce" and not first else MARKS
        right = holds(buffer, want)
        del buffer
    agree(right, "other bytes")
