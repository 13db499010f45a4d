"""Buffers become rank 0's, but for what a rank has on its own."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import mpiddl
from mpiddl.errors import UnsupportedBufferError


class Net(nn.Module):
    """A batch norm, and whatever a test registers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)  # of an odd number of bytes
        self.register_buffer("flag", torch.ones(3, dtype=torch.bool))

    def forward(self, inputs):
        return self.norm(self.linear(inputs))


def train(model, world, steps=1):
    for _ in range(steps):
        model(torch.randn(5, 4) + world.rank).square().mean().backward()
    model.synchronize()


def everyones(values, world):
    return mpiddl.gather_json(values.tolist(), world=world)


@pytest.mark.parametrize("how", ["plain", "overlapped"])
def test_caches_of_other_sizes_stay_a_ranks_own(world, agree, how):
    model = mpiddl.DataParallel(Net(), check_replicas_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if how == "overlapped":
        optimizer = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    net = model.module
    for step in range(3):
        # Rank 0's is now the longest, now the shortest; and some are there on one rank only.
        length = step * (world.size - world.rank) + (2 - step) * world.rank
        net.register_buffer("cache", torch.arange(length), persistent=False)
        net.linear.register_buffer(f"mask{world.rank}", torch.full((2,), world.rank), False)
        net.register_buffer("same", torch.full((2,), world.rank), persistent=False)
        train(model, world)
        optimizer.step()
        model.synchronize()
        agree(torch.equal(net.cache, torch.arange(length)), f"{step}: {net.cache}")
        agree(net.get_buffer(f"linear.mask{world.rank}").tolist() == [world.rank] * 2)
        agree(net.same.tolist() == [0, 0])  # what fits is rank 0's
        means = everyones(net.norm.running_mean, world)
        agree(all(mean == means[0] for mean in means), means)
    mpiddl.replicas.check(model)


def test_persistent_buffers_of_other_sizes_are_named_once(world, agree, caplog):
    model = mpiddl.DataParallel(Net())
    model.module.norm.register_buffer("seen", torch.zeros(1 + world.rank))
    with caplog.at_level(logging.WARNING, "mpiddl"):
        train(model, world, 3)
    said = caplog.text
    agree(said.count("'norm.seen'") == (world.rank > 0), said)
    agree(world.rank == 0 or (f"float32[{1 + world.rank}]" in said and "persistent" in said), said)


def test_a_model_that_had_no_buffers_sends_none(world, agree):
    model = mpiddl.DataParallel(nn.Linear(4, 2))
    if world.rank == 0:
        model.module.register_buffer("cache", torch.ones(3), persistent=False)
    train(model, world, 2)
    mpiddl.barrier(world=world)
    agree(True)


ODD = {
    "sliced": lambda: torch.rand(8, 8)[::2, 1::2],
    "expanded": lambda: torch.rand(1, 4).expand(4, 4),
    "conjugated": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "float8": lambda: torch.rand(4).to(torch.float8_e4m3fn),
}


def plain(tensor):
    values = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(values) if values.is_complex() else values.float()


def test_views_of_all_kinds_become_rank_0s(world, agree):
    net = Net()
    torch.manual_seed(world.rank)
    for kind, make in ODD.items():
        net.register_buffer(kind, make())
    model = mpiddl.DataParallel(net)
    for moment in ("wrapped", "trained"):
        for kind in ODD:
            values = everyones(plain(net.get_buffer(kind)), world)
            agree(all(value == values[0] for value in values), f"{moment}, {kind}: {values}")
        with torch.no_grad():
            net.sliced += world.rank
            net.conjugated += 1j * world.rank
            net.expanded[:1] += world.rank
        train(model, world)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["sparse", "csr", "meta"])
def test_what_cannot_be_exchanged_is_refused_by_name(world, agree, kind):
    net = Net()
    dense = torch.eye(3)
    made = {"sparse": dense.to_sparse, "csr": dense.to_sparse_csr, "meta": lambda: dense.to("meta")}
    net.register_buffer("table", made[kind]())
    way_out = "to_empty" if kind == "meta" else "plain attribute"
    with pytest.raises(UnsupportedBufferError, match=f"'table' is .*{way_out}"):
        mpiddl.DataParallel(net)
    agree(True)


def test_what_is_registered_later_and_cannot_be_exchanged_stays(world, agree, caplog):
    model = mpiddl.DataParallel(Net())
    table = torch.eye(3).to_sparse()
    model.module.register_buffer("table", table)
    with caplog.at_level(logging.WARNING, "mpiddl"):
        train(model, world, 2)
    agree(caplog.text.count("'table' is a sparse") == (world.size > 1), caplog.text)
    agree(model.module.table is table)
