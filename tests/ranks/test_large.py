"""Messages in pieces, and more elements than a 32-bit count can say: MPI's own counts end there."""

from __future__ import annotations

import mmap

import numpy
import psutil
import pytest
import torch

import mpiddl

pytestmark = pytest.mark.library

LENGTH = (1 << 31) + 3
MARKS = {0: 1, (1 << 30) - 1: 2, 1 << 30: 3, (1 << 31) - 1: 4, 1 << 31: 5, LENGTH - 1: 6}
"""Values by place: around the ends of messages, of 32-bit counts, and of the buffer."""


def test_a_message_in_pieces_arrives_whole(world, agree):
    messages = world.messages.in_pieces(100)
    (tag,) = tags = world.tags.keep(1)
    sent, got = (numpy.arange(1003).astype("u1") * factor for factor in (3, 0))

    peers = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    waits = [
        move(array.ctypes.data, array.nbytes, peer, tag, array)
        for move, array, peer in zip(
            (messages.send, messages.receive), (sent, got), peers, strict=True
        )
    ]
    while not all(wait.done() for wait in waits):
        pass
    agree(numpy.array_equal(got, sent), got)
    world.tags.give_back(tags)


@pytest.fixture
def enough_memory(world):
    if world.size != 2:
        pytest.skip("two ranks are enough")
    free = min(mpiddl.gather_json(psutil.virtual_memory().available))
    if free < 5 * LENGTH:
        pytest.skip(f"needs {5 * LENGTH >> 30} GiB of free memory, there are {free >> 30}")


def zeros():
    """Bytes that, on the host, take no memory before they are written."""
    if torch.empty(0).is_cuda:
        return torch.zeros(LENGTH, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, LENGTH), dtype=torch.uint8)


def marked():
    buffer = zeros()
    for place, value in MARKS.items():
        buffer[place] = value
    return buffer


def problem(buffer, factor=1):
    """What differs: looked for around the marks and in one byte of every page."""
    for place, value in MARKS.items():
        around = range(max(0, place - 3), min(LENGTH, place + 4))
        got, want = (
            [int(buffer[at]) for at in around],
            [factor * MARKS.get(at, 0) for at in around],
        )
        if got != want:
            return f"{got} around {place}, not {want} ({value})"
    strays = int(buffer[9 :: mmap.PAGESIZE].count_nonzero())
    return f"{strays} strays" if strays else ""


@pytest.mark.thorough
@pytest.mark.usefixtures("enough_memory")
def test_send_more_elements_than_2_to_the_31(world, agree):
    """The sender only reads: its zeros stay unwritten."""
    if world.rank == 0:
        mpiddl.send(marked(), 1)
        found = ""
    else:
        buffer = zeros()
        mpiddl.recv(buffer, 0)
        found = problem(buffer)
    agree(not found, found)


@pytest.mark.thorough
@pytest.mark.usefixtures("enough_memory")
def test_reduce_more_elements_than_2_to_the_31(world, agree):
    buffer = marked()

    mpiddl.all_reduce(buffer)

    found = problem(buffer, factor=2)
    agree(not found, found)
