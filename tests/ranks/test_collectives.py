"""Broadcast, barrier, JSON objects, handles, groups."""

from __future__ import annotations

import pytest
import torch
from matrix import times
from samples import buffer_of, expected, seeded

import mpiddl

pytestmark = [pytest.mark.layout, pytest.mark.library]


@pytest.mark.parametrize("length", [0, 1, 5, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_broadcast_from_every_root(world, agree, length, dtype):
    for root in range(world.size):
        tensor = buffer_of(world.rank, length, torch.float32).to(dtype)

        mpiddl.broadcast(tensor, root=root)

        agree(torch.equal(tensor, buffer_of(root, length, torch.float32).to(dtype)), tensor[:5])


def test_json_round_trips(world, agree):
    value = {"rank": world.rank, "list": [1, 2.5, None, "ä" * world.rank]}
    everyones = [{"rank": rank, "list": [1, 2.5, None, "ä" * rank]} for rank in range(world.size)]
    last = world.size - 1

    agree(mpiddl.broadcast_json(value, root=last) == everyones[last])
    agree(mpiddl.gather_json(value) == everyones)
    gathered = mpiddl.gather_json(value, root=last)
    agree(gathered == (everyones if world.rank == last else None), gathered)


def test_json_larger_than_a_chunk(world, agree):
    text = "x" * (3 << 20)
    agree(mpiddl.broadcast_json(text if world.rank == 0 else None) == text)


def test_barrier_waits_for_the_last(world, agree, shared_tmp_path):
    """Every rank leaves a file before the barrier; after it all files are there."""
    (shared_tmp_path / str(world.rank)).touch()

    mpiddl.barrier()

    files = sorted(int(path.name) for path in shared_tmp_path.iterdir())
    agree(files == list(range(world.size)), files)


def test_async_works_may_be_waited_for_in_any_order(world, agree):
    order = torch.randperm(50, generator=seeded(world.rank)).tolist()
    buffers = [buffer_of(world.rank, 10 * number, torch.float32) for number in range(50)]

    works = [mpiddl.all_reduce(buffer, async_=True) for buffer in buffers]
    results = {number: works[number].wait() for number in order}

    for number, buffer in enumerate(buffers):
        want = expected("sum", world.size, 10 * number, torch.float32)
        agree(results[number] is buffer and torch.equal(buffer, want), number)


def test_done_helps_a_work_on_and_never_blocks(world, agree):
    work = mpiddl.all_reduce(torch.ones(1000), async_=True)

    while not work.done():
        pass

    agree(torch.equal(work.wait(), torch.full((1000,), float(world.size))))


def test_groups_reduce_among_themselves(world, agree):
    group = world.split(color=world.rank % 2, key=-world.rank)
    members = [rank for rank in range(world.size) if rank % 2 == world.rank % 2]
    total = torch.tensor([world.rank])

    mpiddl.all_reduce(total, world=group)

    agree(group.size == len(members) and group.rank == members[::-1].index(world.rank), group)
    agree(total.item() == sum(members), total)
    group.close()


def test_a_rank_may_stay_out_of_a_split(world, agree):
    group = world.split(None if world.rank == 0 else 7)
    agree((group is None) == (world.rank == 0), group)
    if group is not None:
        group.close()


def test_world_describes_the_layout(world, agree, request):
    agree(mpiddl.init() is world, "init is not idempotent")
    agree(world.local_rank == world.rank and world.local_size == world.size, world)
    agree(world.node_rank == 0 and world.num_nodes == 1, world)
    kind = "cuda" if request.config.getoption("device") == "cuda" else "cpu"
    agree(world.device.type == kind and world.on_gpu == (kind == "cuda"), world.device)
    agree(world.hostname, world)


@pytest.mark.thorough
def test_two_hundred_worlds_come_and_go(world, agree):
    """Communicators are freed: MPICH has some two thousand in all."""
    for _ in range(times(200)):
        with world.split(0) as group:
            mpiddl.barrier(world=group)
    agree(True)
