"""Windows through CUDA IPC: really mapped, the right memory, and freed with nobody in it."""

from __future__ import annotations

import pytest
import torch

import mpiddl


def test_every_rank_sees_every_part(world, agree, gpu):
    """If this fails, all else goes on with messages: see the warning."""
    tensor = mpiddl.empty(1000, device=world.device)
    tensor.fill_(world.rank + 1)
    torch.cuda.current_stream().synchronize()
    mpiddl.barrier()
    windows = gpu.mapped(world)
    number, offset = windows.find(tensor.data_ptr())
    agree(number > 0, "not mapped")
    if number:
        parts = windows.views(number, [offset] * world.local_size, 1000, torch.float32)
        seen = [float(part.mean()) for part in parts]
        node = world.layout.nodes[world.node_rank]
        agree(seen == [rank + 1.0 for rank in node], seen)
    mpiddl.barrier()


@pytest.mark.parametrize("algorithm", ["shared", "auto", "hierarchical"])
def test_windows_come_and_go(world, agree, gpu, algorithm):
    """At the same addresses, in turn; several at a time."""
    if world.num_nodes > 1 and algorithm == "shared":
        pytest.skip("works within one node")
    kept = []
    for turn in range(20):
        length = 1000 * (turn + 1) ** 2
        tensor = mpiddl.empty(length, device=world.device)
        for _ in range(2):
            mpiddl.all_reduce(tensor.fill_(world.rank + turn), algorithm=algorithm)
            want = sum(rank + turn for rank in range(world.size))
            agree(bool((tensor == want).all()), f"{turn}: {tensor[:5]}, not {want}")
        kept = [*kept[-2:], tensor]


def test_gradients_are_in_windows(world, agree, gpu):
    model = mpiddl.DataParallel(torch.nn.Linear(100, 100).to(world.device))
    places = [gpu.mapped(world).find(b.buffer.data_ptr()) for b in model.strategy.gradients.buckets]
    agree(all(number > 0 for number, _ in places), places)
