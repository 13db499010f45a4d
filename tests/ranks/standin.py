"""A GPU made of host memory and threads: late, and out of order wherever CUDA may be.

What is asked of a stream is done by the stream's own thread, in order, after random delays. So a
fence that is missing turns into a wrong sum, and into a crash where memory is freed too early.
The caller's stream is the test itself: it is never late, and it waits where torch's would. Inside
``calling_from`` it is one of the others.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import queue
import random
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from mpiddl.api import all_reduce
from mpiddl.devices.cuda.device import CudaDevice
from mpiddl.devices.host import HostDevice
from mpiddl.devices.registry import device_at, register
from mpiddl.errors import GpuMemoryError

CALLER = 0
FOLDER = Path("/dev/shm")  # noqa: S108 - memory of the node


@contextmanager
def in_place_of_the_host(world, staging=None):
    """All CPU tensors are on a stand-in; gives the device."""
    place = torch.device("cpu")
    runtime = StandIn(world.rank)
    staging = staging or world.settings.staging
    device = CudaDevice(runtime, lambda world: staging != "host")
    before = device_at(place)  # the host, or another stand-in
    short_way_of = all_reduce.short_way_of
    all_reduce.short_way_of = lambda world: None  # the host's
    try:
        yield register(place, device)
    finally:
        register(place, before)
        all_reduce.short_way_of = short_way_of
        runtime.end()


class _Stream:
    """A thread that does what it is asked, in order, some time later."""

    def __init__(self, seed):
        self._chance = random.Random(seed)
        self._asked = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, action):
        self._asked.put(action)

    def _work(self):
        while True:
            action = self._asked.get()
            delay = self._chance.choice((0, 0, 0, 1e-4, 1e-3))
            if delay:
                time.sleep(delay)
            action()


class StandIn:
    """``devices.cuda.runtime.Runtime`` without a GPU.

    Args:
        seed: Of the delays.
        memory: Bytes that there are.

    Attributes:
        lag: Seconds that each copy and each sum takes at least.
    """

    lag = 0.0

    def __init__(self, seed=0, memory=1 << 34):
        self._seed = seed
        self._left = memory
        self._token = os.urandom(4).hex()  # a killed job leaves its files
        self._caller = CALLER
        self._streams = {}
        self._marks = {}  # event -> set when it has happened
        self._numbers = itertools.count(1)
        self._mapped = {}  # address -> memory
        self._files = {}  # address -> file
        self._host = threading.local()  # one for each stream: scratch is not for two threads

    # Memory.

    def malloc(self, nbytes):
        if nbytes > self._left:
            raise GpuMemoryError(f"the stand-in has {self._left} bytes left, not {nbytes}")
        self._left -= nbytes
        name = f"mpiddl-standin-{os.getpid()}-{self._token}-{next(self._numbers)}"
        path = FOLDER / name
        with open(path, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        address = self._map(path)
        self._files[address] = path
        return address

    def free(self, address):
        self._left += len(self._mapped[address])
        if address in self._files:
            self._files.pop(address).unlink()
            self.close(address)

    def pinned(self, nbytes):
        memory = mmap.mmap(-1, nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._mapped[address] = memory
        return address

    def _map(self, path):
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._mapped[address] = memory
        return address

    def as_tensor(self, address, nbytes, owner):
        memory = (ctypes.c_char * nbytes).from_address(address)
        memory.owner = owner
        with torch.inference_mode(mode=False):
            return torch.frombuffer(memory, dtype=torch.uint8)

    def export(self, address):
        return bytes(self._files[address])

    def open(self, handle):
        return self._map(Path(handle.decode()))

    def close(self, address):
        memory = self._mapped.pop(address)
        assert memory is not None

    def end(self):
        """Nothing stays in the folder."""
        for path in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()

    # Streams and events.

    def current(self):
        return nullcontext()

    def make_stream(self):
        number = next(self._numbers)
        self._streams[number] = _Stream(f"{self._seed} {number}")
        return number

    def caller(self):
        return self._caller

    def callers(self):
        return (self._caller,)

    def ask(self, stream, action, seconds=0.0):
        """Let ``stream`` do something, so much later at least."""

        def slow():
            if seconds:
                time.sleep(seconds)
            action()

        self._streams[stream].ask(slow)

    def drain(self, stream):
        """Wait until ``stream`` has done all that it was asked."""
        event = self.make_event()
        self.record(event, stream)
        self._marks[event].wait()

    @contextmanager
    def calling_from(self, stream):
        """The caller's stream is ``stream`` within."""
        before, self._caller = self._caller, stream
        try:
            yield
        finally:
            self._caller = before

    @contextmanager
    def on_stream(self, stream):
        event = self.make_event()
        self.record(event, stream)
        self.let_wait(CALLER, event)
        yield

    def make_event(self):
        return next(self._numbers)

    def record(self, event, stream):
        mark = self._marks[event] = threading.Event()
        if stream == CALLER:
            mark.set()
        else:
            self._streams[stream].ask(mark.set)

    def happened(self, event):
        return self._marks[event].is_set()

    def let_wait(self, stream, event):
        mark = self._marks[event]  # as recorded now: the event may be used again
        if stream == CALLER:
            mark.wait()
        else:
            self._streams[stream].ask(mark.wait)

    # Work.

    def copy(self, target, source, nbytes, stream):
        self.ask(stream, lambda: ctypes.memmove(target, source, nbytes), self.lag)

    def combine(self, op, dtype, sources, weights, targets, length, stream):
        self.ask(
            stream, lambda: self._combine(op, dtype, sources, weights, targets, length), self.lag
        )

    def _combine(self, op, dtype, sources, weights, targets, length):
        if not hasattr(self._host, "device"):
            self._host.device = HostDevice()
        dtype = getattr(torch, dtype)
        views = [
            [
                self.as_tensor(address, length * dtype.itemsize, None).view(dtype)
                if length
                else torch.empty(0, dtype=dtype, device="cpu")
                for address in addresses
            ]
            for addresses in (sources, targets)
        ]
        self._host.device.combine(op, views[0], weights, views[1])
