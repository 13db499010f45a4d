"""What measures GPUs, on a stand-in for one: threads in place of streams, late."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter

import pytest
import torch
from standin import StandIn, in_place_of_the_host

import mpiddl
from mpiddl.bench import bandwidth, gpu_memory, memory, overlap_candidates
from mpiddl.bench.bandwidth import Plan, measure
from mpiddl.bench.candidates import Buffers, Case, InProcess
from mpiddl.bench.lineup import candidates, stagings_of
from mpiddl.bench.timing import seconds_of, wait_for
from mpiddl.bench.tune import choices_of, tune
from mpiddl.cli import bench
from mpiddl.collectives.channel import MessageChannel
from mpiddl.comm.native import Native
from mpiddl.devices.staging import Stage
from mpiddl.errors import PeerError

pytestmark = pytest.mark.thorough

KIB = 1 << 10
MESSAGES = ("ring", "direct", "doubling", "reference", "sendrecv")
LATE = 0.15
"""Seconds; longer than anything else here takes."""


@pytest.mark.host
def test_the_host_has_no_stagings(world, agree):
    agree(stagings_of(world, []) == ([None], []))
    with pytest.raises(PeerError, match="staging 'host'"):
        stagings_of(world, ["host"])


@pytest.mark.host
def test_more_than_the_memory_is_refused_on_every_rank(world, agree):
    calls = {
        "all-reduce of 1024TiB takes at least 2048TiB": lambda: candidates(
            ["auto"], "all-reduce", 1 << 50, world
        ),
        "all-to-all of 1024TiB takes at least 4096TiB": lambda: candidates(
            ["auto"], "all-to-all", 1 << 50, world
        ),
        "1024TiB takes at least": lambda: list(tune(world, [1 << 50], 1)),
        "one rank takes at least": lambda: memory.check_room(
            1 << 50 if world.rank == world.size - 1 else 0, "one rank", world
        ),
    }
    for words, call in calls.items():
        said = ""
        try:
            call()
        except PeerError as error:
            said = str(error)
        agree(words in said, f"{words!r} is not in {said!r}")


@pytest.fixture(scope="module")
def device(request, world):
    if request.config.getoption("device") == "cuda":
        pytest.skip("there is a GPU: tests/gpu measures it")
    with in_place_of_the_host(world, staging="auto") as device:
        yield device


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nobody waits for good figures."""
    monkeypatch.setattr(bandwidth, "MOST_CALLS", 2)
    quick = functools.partial(gpu_memory.measure_gpu_memory, copy_bytes=KIB, link_bytes=KIB)
    monkeypatch.setattr(gpu_memory, "measure_gpu_memory", quick)
    monkeypatch.setattr(memory, "ROUNDS", 1)


def expected_rows(size):
    """(algorithm, placement, staging): two stagings where there are messages, one row elsewhere."""
    if size == 1:
        own = ("auto", "shared", "hierarchical", "library", *MESSAGES[:-1])
        return {(name, place, None) for name in own for place in ("empty", "plain")}
    rows = {("hierarchical", "empty", None)}
    rows |= {(name, "empty", None) for name in ("auto", "shared", "library")}
    rows |= {("library", "plain", None)}
    ways = ("device", "host")
    rows |= {(name, "plain", way) for name in ("auto", "shared") for way in ways}
    places = ("empty", "plain")
    return rows | {(name, place, way) for name in MESSAGES for place in places for way in ways}


@pytest.mark.usefixtures("device")
def test_the_command_measures_both_stagings(world, agree, shared_tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Native, "blocking", None)  # it must never see a GPU's memory
    if world.num_nodes > 1:
        pytest.skip("other algorithms")
    file = shared_tmp_path / "out.json"
    bench._command("all-reduce")(
        sizes="96,100KiB",
        algorithms=f"auto,shared,hierarchical,library,nccl,{','.join(MESSAGES)}",
        device="cuda",
        staging="device,host",
        repeats=2,
        warmup=0,
        json_file=file,
    )
    report = json.loads(file.read_text())
    out = capsys.readouterr().out
    for nbytes in (96, 100 * KIB):
        rows = [row for row in report["rows"] if row["nbytes"] == nbytes]
        seen = Counter((row["algorithm"], row["placement"], row["staging"]) for row in rows)
        agree(seen == Counter(expected_rows(world.size)), seen)
        wrong = [
            row for row in rows if row["wrong"] != (None if "sendr" in row["algorithm"] else 0)
        ]
        agree(not wrong, wrong)
    found = report["memory"]
    names = {"stream_gbps", "copy_gbps", "peer_gbps", "pcie_gbps", "limit_gbps"}
    agree(set(found) == names, found)
    agree((found["peer_gbps"] is None) == (world.size == 1), found)
    agree(min(found["copy_gbps"], found["pcie_gbps"], found["peer_gbps"] or 1) > 0, found)
    if world.rank == 0 and world.size > 1:
        limit = found["copy_gbps"] * (world.size - 1) / world.size**2
        assert "nccl is left out: algorithm 'nccl'" in out
        assert "hierarchical is left out" in out
        assert "sendrecv is no all-reduce" in out
        lines = [line.split() for line in out.splitlines() if " plain/host " in line]
        assert {line[4] for line in lines} == {"auto", "shared", *MESSAGES}
        assert {line[-1] for line in lines} == {f"{limit:.1f}"}


@pytest.mark.parametrize("collective", ["reduce-scatter", "all-gather", "broadcast", "all-to-all"])
def test_every_other_collective(world, agree, device, collective):
    names = ["auto", "library", "horovod"]
    found, missing = candidates(names, collective, 6 * KIB, world, ["device", "host"])
    case = Case(collective, 6 * KIB, torch.float32, "sum")
    rows = list(measure(case, found, world, Plan(2, 0)))

    ways = ("device", "host") if world.size > 1 else (None,)
    want = [("auto", place, way) for place in ("empty", "plain") for way in ways]
    seen = [(row.algorithm, row.placement, row.staging) for row in rows]
    agree(seen == want and all(row.wrong == 0 for row in rows), rows)
    agree(list(missing) == ["library", "horovod"], missing)
    agree(f"MPI's own {collective} is not given GPU memory" in missing["library"])
    agree(missing["horovod"] == "horovod is timed on host memory only")


@pytest.mark.parametrize(
    ("name", "staged"), [("ring", True), ("sendrecv", True), ("library", False)]
)
def test_the_staging_that_is_told_is_used(world, agree, device, monkeypatch, name, staged):
    if world.size == 1:
        pytest.skip("no messages")
    copies = Counter()
    copy_out = Stage.copy_out

    def counted(stage, *arguments):
        copies[current] += 1
        return copy_out(stage, *arguments)

    monkeypatch.setattr(Stage, "copy_out", counted)
    case = Case("all-reduce", 6 * KIB, torch.float32, "sum")
    current = None, "ask"  # ranks tell each other how much memory there is
    found = candidates([name], "all-reduce", 6 * KIB, world, ["device", "host"])[0]
    for candidate in found:  # all of them first, as measure does
        current = candidate._staging, "prepare"
        candidate.prepare(case, check=True)
    for candidate in [*found, *found]:
        current = candidate._staging, "time"
        candidate.time(3, fresh=False)
    # What is timed has a barrier, and the stand-in stages that one's messages too.
    if staged:
        agree(copies["host", "prepare"] > 0 and copies["host", "time"] > 0, copies)
    else:
        agree(copies["host", "prepare"] == 0, copies)
    agree(copies["device", "prepare"] == 0 and copies["device", "time"] == 0, copies)


@pytest.mark.parametrize("staging", ["device", "host"])
@pytest.mark.parametrize("length", [1, 1000, 3 << 20])  # the last: more than one chunk
def test_plain_messages_are_as_many_bytes_as_the_ring_s(
    world, agree, device, monkeypatch, staging, length
):
    if world.size == 1:
        pytest.skip("no neighbour")
    sent, slots = [], []
    send, receive = MessageChannel.send, MessageChannel.receive

    def noted_send(channel, buffer, peer):
        sent.append((buffer.nbytes, peer))
        return send(channel, buffer, peer)

    def noted_receive(channel, buffer, peer):
        slots.append(buffer)
        return receive(channel, buffer, peer)

    runtime, stream = device.runtime, device.runtime.make_stream()
    (candidate,) = (
        each
        for each in candidates(["sendrecv"], "all-reduce", 4 * length, world, [staging])[0]
        if each.placement == "plain"
    )
    case = Case("all-reduce", 4 * length, torch.float32, "sum")
    with runtime.calling_from(stream):
        candidate.prepare(case, check=True)
        runtime.ask(stream, lambda: candidate._source.fill_(world.rank + 1), 0.02)
        monkeypatch.setattr(MessageChannel, "send", noted_send)
        monkeypatch.setattr(MessageChannel, "receive", noted_receive)
        candidate._call()
        monkeypatch.undo()
    left, right = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    segment = -(-length // world.size)
    agree(sum(nbytes for nbytes, _ in sent) == 2 * (world.size - 1) * segment * 4, sent)
    agree({peer for _, peer in sent} == {right} and max(sent)[0] <= 4 << 20, sent)
    agree(all(bool((slot == left + 1).all()) for slot in slots), [slot[:3] for slot in slots])


@pytest.mark.parametrize("nbytes", [8, 6 * KIB, 9 << 20])  # more than one chunk, and piece
def test_ranks_may_go_different_ways(world, agree, device, nbytes):
    device.use_staging(world, "host" if world.rank % 2 else "device")
    tensor = torch.full((nbytes // 4,), float(world.rank + 1))
    mpiddl.all_reduce(tensor, algorithm="ring")
    device.use_staging(world, "device")

    total = world.size * (world.size + 1) / 2
    agree(bool((tensor == total).all()), tensor[:4])


class Slow(InProcess):
    """Its work is done late, on the caller's stream."""

    def bind(self, case, source, target):
        runtime, stream = self._buffers.device.runtime, self._buffers.device.runtime.caller()
        return lambda: runtime.ask(stream, lambda: None, LATE)


@pytest.mark.parametrize("fresh", [False, True])
def test_time_goes_on_until_the_result_can_be_used(world, agree, device, fresh):
    candidate = Slow("slow", Buffers("plain", "all-reduce", KIB, world), world)
    case = Case("all-reduce", KIB, torch.float32, "sum")
    stream = device.runtime.make_stream()
    with device.runtime.calling_from(stream):
        candidate.prepare(case, check=False)
        candidate._call()  # asked before: not to be counted
        seconds = candidate.time(2, fresh)
    agree(seconds >= LATE, f"{seconds} s a call, each takes {LATE} s at least")


@pytest.mark.parametrize("fresh", [None, torch.zeros(4)])
def test_what_was_asked_before_does_not_count(device, fresh):
    runtime = device.runtime
    stream = runtime.make_stream()
    with runtime.calling_from(stream):
        runtime.ask(stream, lambda: None, 2 * LATE)
        nothing = functools.partial(int)
        seconds = seconds_of(nothing, 1, nothing, fresh, lambda: wait_for(device.settled()))
    assert seconds < LATE


def test_who_trains_alone_waits_for_the_last_gpu(world, agree, device):
    """As long as others would: what backward takes is no communication."""
    way = overlap_candidates._none("", overlap_candidates.Options(), world, torch.nn.Linear(2, 2))
    runtime, stream = device.runtime, device.runtime.make_stream()
    mpiddl.barrier()
    began = time.perf_counter()
    with runtime.calling_from(stream):
        runtime.ask(stream, lambda: None, LATE if world.rank == 0 else 0.0)
        way.exchange()
    seconds = time.perf_counter() - began
    agree(seconds >= LATE * 0.9, f"{seconds} s, and rank 0 computes for {LATE} s")


def test_which_stagings_there_are(world, agree):
    if world.on_gpu:
        pytest.skip("there is a GPU")
    with in_place_of_the_host(world, staging="auto"):
        agree(stagings_of(world, []) == (["device"], []))
        agree(stagings_of(world, ["host", "device"]) == (["host", "device"], []))
    with in_place_of_the_host(world, staging="host"):
        agree(stagings_of(world, []) == (["host"], []))
        ways, missing = stagings_of(world, ["device", "host"])
        agree(ways == ["host"] and "not every rank's MPI reads GPU memory" in missing[0], missing)
        with pytest.raises(PeerError, match="staging 'device'"):
            stagings_of(world, ["device"])


def test_copies_between_the_ranks_of_a_node(world, agree, device, monkeypatch):
    sources = []
    copy = device.copy

    def noted(target, source):
        # Own parts are found by address, peers' are not.
        sources.append((source.data_ptr(), device.mapped(world).find(source.data_ptr())[0]))
        copy(target, source)

    monkeypatch.setattr(device, "copy", noted)
    ranks = gpu_memory.peer_bandwidth(world, nbytes=KIB, rounds=2)
    if world.local_size == world.size == 1:
        agree(ranks is None, ranks)
        return
    agree([rank["local_rank"] for rank in ranks if rank["hostname"] == world.hostname])
    rates = ranks[world.rank]["from_gbps"]
    agree(len(rates) == world.local_size and rates[world.local_rank] is None, rates)
    agree(all(rate > 0 for rate in rates if rate is not None), rates)
    agree(rates.count(None) == 1, rates)
    agree(len(set(sources)) == world.local_size - 1, sources)
    agree(not any(own for _, own in sources), sources)


def test_no_copies_where_memory_cannot_be_mapped(world, agree, monkeypatch):
    def refuse(runtime, handle):
        raise OSError("not today")

    if world.on_gpu:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(StandIn, "open", refuse)
    with in_place_of_the_host(world):
        agree(gpu_memory.peer_bandwidth(world, nbytes=KIB, rounds=1) is None)
        found = gpu_memory.measure_gpu_memory(world, copy_bytes=KIB, link_bytes=KIB)
    agree(found["peer_gbps"] is None and found["pcie_gbps"] > 0, found)


def test_tune(world, agree, device):
    tuned = world.tuned
    try:
        rows = list(tune(world, [8, 40 * KIB], repeats=1))
    finally:
        world.tuned = tuned
    names = {row.algorithm for row in rows}
    rings = {f"ring/{nbytes << 20}" for nbytes in (1, 4, 16)}
    agree(rings < names and not any("nccl" in name or "library" in name for name in names), names)
    agree({row.placement for row in rows} == {"empty"})
    agree(choices_of(rows)[-1].up_to is None)
