"""Several nodes: real ranks and real MPI, drawn apart so that only messages join the parts."""

from __future__ import annotations

import pytest
import torch
from samples import buffer_of, expected

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS, choose
from mpiddl.comm import world as worlds
from mpiddl.comm.layout import find_layout
from mpiddl.comm.tuning import Choice
from mpiddl.comm.world import World

pytestmark = pytest.mark.layout

LAYOUTS = {
    "alternating": lambda rank: rank % 2,
    "first alone": lambda rank: min(rank, 1),
    "pairs": lambda rank: rank // 2,
}


@pytest.fixture(params=LAYOUTS)
def nodes(request, world, monkeypatch):
    """A world whose ranks are on nodes of one, two or three ranks."""
    if world.num_nodes > 1:
        pytest.skip("these are real ones")
    color = LAYOUTS[request.param](world.rank)
    monkeypatch.setattr(worlds, "_node_of", lambda comm: comm.Split(color, comm.Get_rank()))
    with World(world._comm, world.launch, world.settings, world.device) as apart:
        yield apart


def test_layout(nodes, agree):
    layout = nodes.layout
    ranks = [rank for node in layout.nodes for rank in node]
    agree(sorted(ranks) == list(range(nodes.size)), layout)
    agree(layout.nodes[nodes.node_rank][nodes.local_rank] == nodes.rank, layout)


def test_the_launchers_local_ranks_count_where_they_number_the_node(world, agree):
    node = worlds._node_of(world._comm)
    size, place = node.Get_size(), node.Get_rank()

    def layout(announced):
        return find_layout(world._comm, node, announced)

    turned = layout((place + 1) % size)
    agree((turned.place, turned.local_rank) == (place, (place + 1) % size), turned)
    agree(turned.nodes == world.layout.nodes, turned)
    last = [ranks[-1] for ranks in turned.nodes]  # has local rank 0
    agree(list(turned.firsts) == last, turned)
    for announced in (None, 0 if size > 1 else 7, place + 1):
        agree(layout(announced).local_rank == place, announced)
    node.Free()


@pytest.mark.parametrize("name", ["auto", *ALGORITHMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("where", ["plain", "window"])
def test_every_algorithm(nodes, agree, name, dtype, where):
    algorithm = ALGORITHMS.get(name)
    if algorithm and (
        dtype not in algorithm.dtypes or (algorithm.one_node and nodes.num_nodes > 1)
    ):
        pytest.skip("refused, as other tests see")
    for length in (0, 1, 7, 5000, 200_003):
        buffer = torch.empty(length, dtype=dtype)
        if where == "window":
            buffer = mpiddl.empty(length, dtype, world=nodes)
        buffer.copy_(buffer_of(nodes.rank, length, dtype))
        mpiddl.all_reduce(buffer, algorithm=name, world=nodes)
        want = expected("sum", nodes.size, length, dtype)
        agree(torch.equal(buffer, want), f"{length}: {buffer[:9]}, not {want[:9]}")


def test_a_mean_and_unequal_weights(nodes, agree):
    for length in (3, 100_000):
        buffer = mpiddl.empty(length, world=nodes)
        buffer.copy_(buffer_of(nodes.rank, length, torch.float32))
        weight = nodes.rank / 2
        mpiddl.all_reduce(buffer, algorithm="hierarchical", pre_scale=weight, world=nodes)
        want = sum(r / 2 * buffer_of(r, length, torch.float32) for r in range(nodes.size))
        agree(torch.allclose(buffer, want), f"{buffer[:9]}, not {want[:9]}")
        mean = mpiddl.empty(length, world=nodes)
        mean.copy_(buffer_of(nodes.rank, length, torch.float32))
        mpiddl.all_reduce(mean, "mean", algorithm="hierarchical", world=nodes)
        want = expected("sum", nodes.size, length, torch.float32) / nodes.size
        agree(torch.allclose(mean, want), f"{mean[:9]}, not {want[:9]}")


def test_auto_follows_the_layout(nodes, agree):
    run = choose("auto", torch.float32, 1 << 24, nodes).algorithm.run
    if nodes.num_nodes == 1:
        want = "shared" if nodes.size > 1 else "ring"
    else:
        want = "hierarchical" if nodes.num_nodes < nodes.size else "ring"
    agree(nodes.size == 1 or run is ALGORITHMS[want].run, want)


def test_auto_goes_by_what_was_measured(nodes, agree, monkeypatch):
    table = [
        Choice(1000, "doubling", 4096),
        Choice(2000, "shared", 4096),
        Choice(None, "direct", 1),
    ]
    monkeypatch.setattr(nodes, "tuned", table)
    chosen = [choose("auto", torch.float32, nbytes, nodes) for nbytes in (1000, 1001, 2001)]
    usable = nodes.num_nodes == 1
    names = ["doubling", "shared" if usable else "doubling", "direct"]
    agree([c.algorithm for c in chosen] == [ALGORITHMS[name] for name in names], names)
    agree(chosen[0].chunk_bytes == 4096 and chosen[2].chunk_bytes == 1)


def test_data_parallel(nodes, agree):
    torch.manual_seed(0)
    model = mpiddl.DataParallel(torch.nn.Linear(300, 200), world=nodes, bucket_size="64KiB")
    x = torch.full((2, 300), float(nodes.rank))
    model(x).sum().backward()
    mean = sum(range(nodes.size)) / nodes.size
    gradient = model.module.weight.grad
    agree(torch.allclose(gradient, torch.full_like(gradient, 2 * mean)), gradient[0, :5])
