"""A device may be late before a collective and after it: nobody reads or writes too early.

On a stand-in for a GPU, whose work is done by threads some time later.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import NAMES, Case
from samples import buffer_of, expected

import mpiddl
from mpiddl.collectives import nccl
from mpiddl.collectives.choose import ALGORITHMS
from mpiddl.errors import GpuMemoryError, UnsupportedBufferError

SLOW = 0.003
"""Seconds; messages take less."""


@pytest.fixture(scope="module")
def stream(device):
    """Where the caller's work is done, late."""
    return device.runtime.make_stream()


def written_late(runtime, stream, tensor, seconds=SLOW):
    """What ``tensor`` holds now it will hold a little later; until then it holds something else."""
    value = tensor.clone()
    tensor.fill_(77)
    runtime.ask(stream, lambda: tensor.copy_(value), seconds)


def check_late(case, runtime, stream, **arguments):
    for _, tensor, _ in case.must_hold:
        written_late(runtime, stream, tensor)
    problems = []
    with runtime.calling_from(stream):
        case.start(**arguments)
        runtime.ask(stream, lambda: problems.append(case.problem()))
    runtime.drain(stream)
    return problems[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [3, 30_000])
def test_every_collective(world, agree, device, stream, name, length):
    for seed in range(4):
        case = Case(name, world, seed, torch.float32, length=length)
        problem = check_late(case, device.runtime, stream)
        agree(not problem, problem)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("length", [3, 300_000])
@pytest.mark.parametrize("where", ["plain", "window"])
def test_every_algorithm(world, agree, device, stream, algorithm, length, where):
    if ALGORITHMS[algorithm].reach and where == "plain":
        pytest.skip("works on memory that is mapped")
    runtime = device.runtime
    for scale in (None, 0.5):
        tensor = mpiddl.empty(length) if where == "window" else torch.empty(length)
        tensor.copy_(buffer_of(world.rank, length, torch.float32))
        want = expected("sum", world.size, length, torch.float32) * (scale or 1)
        written_late(runtime, stream, tensor)
        seen = []
        with runtime.calling_from(stream):
            mpiddl.all_reduce(tensor, "sum", algorithm=algorithm, post_scale=scale)
            runtime.ask(stream, lambda: seen.append(tensor.clone()))  # noqa: B023 - drained below
        runtime.drain(stream)
        agree(torch.equal(seen[0], want), f"{seen[0][:9]}, not {want[:9]}")


def test_send_and_receive(world, agree, device, stream):
    if world.size == 1:
        pytest.skip("nobody to talk to")
    runtime, peer = device.runtime, world.rank ^ 1
    if peer < world.size:
        mine = torch.full((5000,), float(world.rank))
        theirs = torch.full((5000,), -1.0)
        for tensor in (mine, theirs):
            written_late(runtime, stream, tensor)
        with runtime.calling_from(stream):
            work = mpiddl.send(mine, peer, async_=True)
            mpiddl.recv(theirs, peer)
            work.wait()
        runtime.drain(stream)
    agree(peer >= world.size or bool((theirs == peer).all()))


def test_large_messages_do_not_let_others_pass(world, agree, device):
    """One is in many pieces, of which few are under way; the next has the same tag."""
    if world.size == 1:
        pytest.skip("nobody to talk to")
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    lengths = (4_000_000, 10, 5_000_000, 1)
    works = [mpiddl.send(torch.full((n,), float(world.rank)), right, async_=True) for n in lengths]
    got = [torch.full((n,), -1.0) for n in lengths]
    for tensor in got:
        mpiddl.recv(tensor, left)
    for work in works:
        work.wait()
    agree(all(bool((tensor == left).all()) for tensor in got), [tensor[:3] for tensor in got])


def test_many_messages_of_one_tag_at_once(world, agree, device, stream):
    """The note of one must not come before what an earlier one carries."""
    if world.size == 1:
        pytest.skip("nobody to talk to")
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    lengths = (2_500_000, 7, 16, 30_000)
    mine = [torch.full((n,), float(world.rank + n)) for n in lengths]
    theirs = [torch.full((n,), -1.0) for n in lengths]
    for tensor in mine:
        written_late(device.runtime, stream, tensor)
    with device.runtime.calling_from(stream):
        works = [mpiddl.send(tensor, right, async_=True) for tensor in mine]
        works += [mpiddl.recv(tensor, left, async_=True) for tensor in theirs]
        for work in works:
            work.wait()
    device.runtime.drain(stream)
    agree(all(bool((t == left + n).all()) for t, n in zip(theirs, lengths, strict=True)), theirs)


def test_one_after_the_other_without_waiting_in_between(world, agree, device, stream):
    """The caller's stream never stops: each collective begins where the one before ends."""
    runtime = device.runtime
    tensor = torch.full((4000,), float(world.rank))
    with runtime.calling_from(stream):
        for _ in range(5):
            mpiddl.all_reduce(tensor, "mean")
            runtime.ask(stream, lambda: tensor.add_(world.rank), SLOW)
    runtime.drain(stream)
    mean = (world.size - 1) / 2
    agree(torch.allclose(tensor, torch.full_like(tensor, 5 * mean + world.rank)), tensor[:3])


def test_gradients_come_on_streams_of_their_own(world, agree, device):
    """A bucket waits for every stream on which a gradient of it came, not for the last alone."""
    runtime = device.runtime
    streams = [runtime.make_stream() for _ in range(3)]
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(3)))
    came = []

    def late(parameter):  # the first hook of each parameter: its gradient comes late, on a stream
        if parameter.grad is not None and came is not None:
            runtime._caller = streams[len(came) % 3]
            came.append(parameter)
            # The first is the last to be there.
            written_late(runtime, runtime._caller, parameter.grad, SLOW * 10 ** (3 - len(came)))

    model = mpiddl.DataParallel(layers, bucket_size="1MiB", broadcast_buffers=False)
    x = torch.full((2, 64), float(world.rank + 1))
    model(x).sum().backward()  # from now on gradients are views, which hooks leave where they are
    first = [parameter.grad.clone() for parameter in layers.parameters()]
    model.unwrap()
    for parameter in layers.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(late)
    model = mpiddl.DataParallel(layers, bucket_size="1MiB", broadcast_buffers=False)
    for parameter, view in zip(
        model.strategy.parameters, model.strategy.gradients.views, strict=True
    ):
        parameter.grad = view.zero_()
    try:
        model(x).sum().backward()
    finally:
        runtime._caller = 0
    for stream in streams:
        runtime.drain(stream)
    agree(len(came) == 3, came)
    for parameter, want in zip(layers.parameters(), first, strict=True):
        agree(torch.allclose(parameter.grad, want), f"{parameter.grad[0, :3]}, not {want[0, :3]}")
    model.unwrap()


@pytest.mark.parametrize("algorithm", ["shared", "ring", "direct", "doubling", "reference"])
def test_gradients_are_there_when_backward_returns(world, agree, device, algorithm):
    """Some algorithms end with a copy that nobody waits for."""
    layer = torch.nn.Linear(64, 64, bias=False)
    model = mpiddl.DataParallel(
        layer, algorithm=algorithm, engine="inline", broadcast_buffers=False
    )
    x = torch.full((2, 64), float(world.rank + 1))
    model(x).sum().backward()  # after which ranks agree on an order
    model.zero_grad()
    device.runtime.lag = SLOW
    try:
        model(x).sum().backward()
        got = layer.weight.grad.clone()
    finally:
        device.runtime.lag = 0.0
    agree(torch.allclose(got, torch.full_like(got, float(world.size + 1))), got[0, :3])
    model.unwrap()


@pytest.mark.parametrize("algorithm", ["ring", "doubling", "reference"])
def test_a_work_is_over_when_it_is_waited_for(world, agree, device, algorithm):
    tensor = buffer_of(world.rank, 5000, torch.float32)
    device.runtime.lag = SLOW
    try:
        mpiddl.all_reduce(tensor, algorithm=algorithm, post_scale=2.0, async_=True).wait()
        got = tensor.clone()
    finally:
        device.runtime.lag = 0.0
    agree(torch.equal(got, 2 * expected("sum", world.size, 5000, torch.float32)), got[:5])


@pytest.mark.parametrize("engine", ["inline", "after"])
def test_gradients_are_brought_in_on_the_stream_that_ends_backward(world, agree, device, engine):
    """With "after" that is another one than those on which they came."""
    runtime = device.runtime
    stream = runtime.make_stream()
    layer = torch.nn.Linear(128, 128, bias=False)
    model = mpiddl.DataParallel(layer, engine=engine, broadcast_buffers=False)
    bring_in = model.strategy.gradients.take

    def late(member):
        buckets = bring_in(member)
        runtime._caller = stream
        written_late(runtime, stream, model.strategy.gradients.views[member])
        return buckets

    model.strategy.gradients.take = late
    try:
        model(torch.full((2, 128), float(world.rank + 1))).sum().backward()
    finally:
        runtime._caller = 0
    runtime.drain(stream)
    got, want = layer.weight.grad, float(world.size + 1)  # two rows of the mean of rank + 1
    agree(bool((got == want).all()), f"{got[0, :3]}, not {want}")
    model.unwrap()


@pytest.mark.parametrize("bucket_size", ["1MiB", "16KiB"])  # in one piece, and in several
def test_gradients_outlive_their_streams_when_they_are_brought_in(
    world, agree, device, monkeypatch, bucket_size
):
    """torch may give their memory away, to the stream on which they came: it must wait before."""
    runtime = device.runtime
    came, ends = runtime.make_stream(), runtime.make_stream()
    order = []
    layer = torch.nn.Linear(128, 128, bias=False)
    layer.weight.register_post_accumulate_grad_hook(
        lambda parameter: setattr(runtime, "_caller", came)
    )
    model = mpiddl.DataParallel(
        layer, engine="after", bucket_size=bucket_size, broadcast_buffers=False
    )
    bring_in, fill = model.strategy.gradients.take, model.strategy.gradients.fill

    def take(member):
        runtime._caller = ends
        order.append("take")
        return bring_in(member)

    def let_wait(stream, event, honestly=runtime.let_wait):
        order.append(stream)
        honestly(stream, event)

    monkeypatch.setattr(model.strategy.gradients, "take", take)
    monkeypatch.setattr(
        model.strategy.gradients, "fill", lambda bucket: (order.append("full"), fill(bucket))
    )
    monkeypatch.setattr(runtime, "let_wait", let_wait)
    try:
        model(torch.full((2, 128), float(world.rank + 1))).sum().backward()
    finally:
        runtime._caller = 0
    brought_in = order[order.index("take") + 1 : order.index("full")]
    agree(brought_in == [ends, came], f"{order}: {ends} did not wait for {came}, or that for it")
    model.unwrap()


@pytest.mark.parametrize("count", [1, 16, 17, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_more_ranks_than_a_kernel_takes(agree, device, count, weighted):
    sources = [buffer_of(rank, 1000, torch.float32) for rank in range(count)]
    weights = [float(rank % 3) for rank in range(count)] if weighted else None
    want = sum(s * w for s, w in zip(sources, weights or [1.0] * count, strict=True))
    targets = [*(torch.empty(1000) for _ in range(count - 1)), sources[-1]]
    device.combine("sum", sources, weights, targets)
    fence = device.fence()
    while not fence.done():
        pass
    agree(all(torch.equal(target, want) for target in targets))


def test_no_memory_is_an_error_on_every_rank_that_says_how_much(world, agree, device):
    last = world.rank == world.size - 1
    taken = 1 << 40 if last else 0  # more than what earlier tests may give back meanwhile
    device.runtime._left -= taken
    try:
        with pytest.raises(GpuMemoryError, match=rf"rank {world.size - 1}: .*") as error:
            mpiddl.DataParallel(torch.nn.Linear(1000, 1000))
    finally:
        device.runtime._left += taken
    agree("MiB of float32" in str(error.value) and "buckets" in str(error.value), error.value)


@pytest.mark.parametrize("wants", ["all_reduce", "DataParallel"])
def test_nccl_that_one_rank_lacks_is_an_error_on_every_rank(
    world, agree, device, monkeypatch, wants
):
    if world.size == 1:
        pytest.skip("needs no NCCL")
    missing = "has none" if world.rank == world.size - 1 else None
    monkeypatch.setattr(nccl, "nccl_missing", lambda: missing)
    wanting = {
        "all_reduce": functools.partial(mpiddl.all_reduce, torch.ones(3)),
        "DataParallel": functools.partial(mpiddl.DataParallel, torch.nn.Linear(2, 2)),
    }
    with world.split(0) as group, pytest.raises(UnsupportedBufferError) as error:
        wanting[wants](algorithm="nccl", world=group)
    agree(f"has none (rank {world.size - 1})" in str(error.value), error.value)


def test_memory_that_cannot_be_mapped_still_works(world, agree, device, monkeypatch, caplog):
    """As where ranks see different GPUs: one warning, and messages."""
    if world.size == 1:
        pytest.skip("nobody to map")

    def refuse(handle):
        raise OSError("peer access is not supported")

    with world.split(0) as group:
        if world.rank == 0:
            monkeypatch.setattr(device.runtime, "open", refuse)
        tensor = mpiddl.empty(1000, world=group).fill_(world.rank)
        monkeypatch.undo()
        agree(device.mapped(group).find(tensor.data_ptr()) == (0, 0), "still in a window")
        mpiddl.all_reduce(tensor, world=group)
        agree(bool((tensor == sum(range(world.size))).all()), tensor[:3])
        with pytest.raises(UnsupportedBufferError, match="have mapped"):
            mpiddl.all_reduce(tensor, algorithm="hierarchical", world=group)
    agree(world.rank > 0 or "not shared within a node" in caplog.text, caplog.text)


def test_windows_without_views_are_freed_with_the_next(world, agree, device):
    mpiddl.empty(10)
    left = device.runtime._left
    for _ in range(20):
        tensor = mpiddl.empty(3 << 20)
        mpiddl.all_reduce(tensor.fill_(1))
    agree(device.runtime._left >= left - (64 << 20), f"{left - device.runtime._left} bytes more")


def test_closed_groups_leave_no_memory(world, agree, device):
    left = device.runtime._left
    for _ in range(10):
        with world.split(0) as group:
            mpiddl.all_reduce(mpiddl.empty(3 << 20, world=group).fill_(1), world=group)
    # The engine's thread may hold a buffer for a moment longer: one may stay, not one each time.
    agree(device.runtime._left >= left - (16 << 20), f"{left - device.runtime._left} bytes more")
