"""What measures GPUs, on real ones: small sizes, every algorithm; the figures are not looked at."""

from __future__ import annotations

import functools
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import mpiddl
from mpiddl.bench import bandwidth, gpu_memory, memory
from mpiddl.bench.bandwidth import Plan, measure
from mpiddl.bench.candidates import Case
from mpiddl.bench.lineup import candidates, stagings_of
from mpiddl.bench.sendrecv import SENDRECV
from mpiddl.bench.tune import choices_of, tune
from mpiddl.cli import bench
from mpiddl.collectives.choose import ALGORITHMS

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def small(world, gpu, monkeypatch):
    """Nobody waits for good figures. Afterwards messages go as they do in training."""
    monkeypatch.setattr(bandwidth, "MOST_CALLS", 2)
    quick = functools.partial(gpu_memory.measure_gpu_memory, copy_bytes=MIB, link_bytes=MIB)
    monkeypatch.setattr(gpu_memory, "measure_gpu_memory", quick)
    monkeypatch.setattr(memory, "ROUNDS", 1)
    yield
    mpiddl.barrier()
    gpu.use_staging(world, gpu.stagings(world)[0])


@pytest.fixture
def shared_file(world):
    """One path for all ranks."""
    with tempfile.TemporaryDirectory() if world.rank == 0 else nullcontext() as folder:
        yield Path(mpiddl.broadcast_json(folder)) / "out.json"
        mpiddl.barrier()


def test_the_command_measures_every_algorithm(world, agree, shared_file):
    names = ["auto", *ALGORITHMS, SENDRECV]
    bench._command("all-reduce")(
        sizes="96,100KiB,5MiB",  # the last: more than one chunk
        algorithms=",".join(names),
        device="cuda",
        staging=",".join(stagings_of(world, [])[0]) if world.size > 1 else "",
        repeats=2,
        warmup=0,
        json_file=shared_file,
    )
    report = json.loads(shared_file.read_text())
    wrong = [row for row in report["rows"] if row["wrong"]]
    agree(not wrong, wrong)
    # hierarchical, nccl and sendrecv are left out where they cannot run.
    must = {"auto", "library", "ring", "direct", "doubling", "reference"}
    for nbytes in (96, 100 * KIB, 5 * MIB):
        seen = {row["algorithm"] for row in report["rows"] if row["nbytes"] == nbytes}
        agree(must <= seen, f"{nbytes}: {seen}")
    found = report["memory"]
    agree(found["copy_gbps"] > 0 and found["pcie_gbps"] > 0, found)
    agree(found["peer_gbps"] is None or found["peer_gbps"] > 0, found)


@pytest.mark.parametrize("collective", ["reduce-scatter", "all-gather", "broadcast", "all-to-all"])
def test_every_other_collective(world, agree, collective):
    ways, _ = stagings_of(world, [])
    found, _ = candidates(["auto"], collective, 6 * KIB, world, ways)
    rows = list(measure(Case(collective, 6 * KIB, torch.float32, "sum"), found, world, Plan(2, 0)))
    agree(rows and all(row.wrong == 0 for row in rows), rows)


def test_every_staging_that_there_is(world, agree, gpu):
    """Each in turn, whatever training uses."""
    if world.size == 1:
        pytest.skip("no messages")
    every = mpiddl.gather_json(list(gpu.stagings(world)))
    ways = [way for way in every[0] if all(way in theirs for theirs in every)]
    found, _ = candidates(["ring", "direct", SENDRECV], "all-reduce", 9 * MIB, world, ways)
    rows = list(
        measure(Case("all-reduce", 9 * MIB, torch.float32, "sum"), found, world, Plan(2, 0))
    )
    agree({row.staging for row in rows} == set(ways), rows)
    agree(not any(row.wrong for row in rows), rows)


def test_tune(world, agree):
    tuned = world.tuned
    try:
        rows = list(tune(world, [8, 40 * KIB], repeats=1))
    finally:
        world.tuned = tuned
    agree(all(row.seconds > 0 for row in rows) and choices_of(rows), rows)


def test_memory_between_gpus(world, agree):
    found = gpu_memory.measure_gpu_memory(world)
    agree(found["copy_gbps"] > 0 and found["pcie_gbps"] > 0, found)
    agree(len(set(mpiddl.gather_json(found["copy_gbps"]))) == 1, "ranks have other figures")
