"""Every collective, with inputs drawn from a seed and the result they must have, without MPI."""

from __future__ import annotations

import random

import torch
from samples import buffer_of, expected

import mpiddl
from mpiddl.base.segments import split

MOVED_ONLY = (torch.bool, torch.complex64, torch.uint8, torch.float64)


class Case:
    """One collective. ``start()`` calls it; afterwards ``problem()`` is empty if all is right.

    Every rank draws the same from ``seed``.
    """

    def __init__(self, name, world, seed, dtype, op="sum", length=10, numpy=False):
        self.name, self.world, self.dtype, self.op = name, world, dtype, op
        self.random = random.Random(seed)
        self.length = length
        self.numpy = numpy and dtype is not torch.bfloat16
        self.root = self.random.randrange(world.size)
        self.must_hold = []
        self.call = getattr(self, name)()

    def start(self, **arguments):
        return self.call(world=self.world, **arguments)

    def problem(self):
        for what, tensor, want in self.must_hold:
            if not torch.equal(tensor, want):
                return f"{self.name} {self.dtype} {self.op}: {what} {tensor[:9]}, not {want[:9]}"
        return ""

    # What the calls below are made of.

    def given(self, tensor):
        return tensor.numpy() if self.numpy else tensor

    def placed(self, tensor):
        """An array's memory is the host's."""
        return tensor.cpu() if self.numpy else tensor

    def data(self, rank, length):
        return self.placed(buffer_of(rank, length, self.dtype))

    def input(self, length):
        """This rank's, which must stay as it is."""
        tensor = self.data(self.world.rank, length)
        self.must_hold.append(("input", tensor, tensor.clone()))
        return self.given(tensor)

    def output(self, want):
        tensor = torch.full_like(want, 99)
        self.must_hold.append(("output", tensor, want))
        return self.given(tensor)

    def in_place(self, want):
        tensor = self.data(self.world.rank, self.length)
        self.must_hold.append(("tensor", tensor, want))
        return self.given(tensor)

    def reduced(self):
        return self.placed(expected(self.op, self.world.size, self.length, self.dtype))

    def some_lengths(self):
        """One for each rank: all equal, or each its own, with zeros."""
        size = self.world.size
        if self.random.random() < 0.3:
            return None, [self.length] * size
        lengths = [self.random.choice([0, 1, self.length, 2 * self.length]) for _ in range(size)]
        return lengths, lengths

    def all_parts(self, lengths):
        return torch.cat([self.data(rank, length) for rank, length in enumerate(lengths)])

    # One method for each collective, named as it is: prepares, and returns the call.

    def all_reduce(self):
        tensor = self.in_place(self.reduced())
        return lambda **rest: mpiddl.all_reduce(tensor, self.op, **rest)

    def reduce(self):
        mine = self.world.rank == self.root
        want = self.reduced() if mine else self.data(self.world.rank, self.length)
        tensor = self.in_place(want)
        return lambda **rest: mpiddl.reduce(tensor, self.op, self.root, **rest)

    def reduce_scatter(self):
        segment = split(self.length, self.world.size)[self.world.rank]
        output, mine = self.output(self.reduced()[segment]), self.input(self.length)
        return lambda **rest: mpiddl.reduce_scatter(output, mine, self.op, **rest)

    def broadcast(self):
        tensor = self.in_place(self.data(self.root, self.length))
        return lambda **rest: mpiddl.broadcast(tensor, self.root, **rest)

    def all_gather(self):
        told, lengths = self.some_lengths()
        output = self.output(self.all_parts(lengths))
        mine = self.input(lengths[self.world.rank])
        return lambda **rest: mpiddl.all_gather(output, mine, lengths=told, **rest)

    def gather(self):
        told, lengths = self.some_lengths()
        mine, output = self.input(lengths[self.world.rank]), None
        if self.world.rank == self.root:
            output = self.output(self.all_parts(lengths))
        return lambda **rest: mpiddl.gather(output, mine, self.root, lengths=told, **rest)

    def scatter(self):
        told, lengths = self.some_lengths()
        output, whole = self.output(self.data(self.world.rank, lengths[self.world.rank])), None
        if self.world.rank == self.root:
            whole = self.all_parts(lengths)
            self.must_hold.append(("input", whole, whole.clone()))
            whole = self.given(whole)
        return lambda **rest: mpiddl.scatter(output, whole, self.root, lengths=told, **rest)

    def all_to_all(self):
        size, rank = self.world.size, self.world.rank
        # lengths[sender][receiver]
        equal = self.random.random() < 0.3
        lengths = [
            [self.length if equal else self.random.randrange(self.length + 1) for _ in range(size)]
            for _ in range(size)
        ]
        outgoing, incoming = lengths[rank], [row[rank] for row in lengths]
        mine = self.input(sum(outgoing))
        parts = [
            self.data(sender, sum(row))[sum(row[:rank]) :][: row[rank]]
            for sender, row in enumerate(lengths)
        ]
        output = self.output(torch.cat(parts))
        told = {} if equal else {"input_lengths": outgoing, "output_lengths": incoming}
        return lambda **rest: mpiddl.all_to_all(output, mine, **told, **rest)

    def barrier(self):
        return lambda **rest: mpiddl.barrier(**rest)


NAMES = (
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "broadcast",
    "all_gather",
    "gather",
    "scatter",
    "all_to_all",
    "barrier",
)
MOVES = ("broadcast", "all_gather", "gather", "scatter", "all_to_all")
