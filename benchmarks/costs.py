"""What DataParallel itself costs: per gradient, per bucket, while idle, in memory, for a trace.

    OMP_NUM_THREADS=1 tools/mpirun -n 1 python benchmarks/costs.py     # bookkeeping alone
    OMP_NUM_THREADS=1 tools/mpirun -n 2 python benchmarks/costs.py     # exchange included

Candidates take turns; costs are differences of medians between them. "fresh": autograd has made a
new gradient, which is brought into its bucket; "in place": it has added to the one that is there.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy
import torch

import mpiddl
from mpiddl.bench.models import DEFAULTS, batches, build, loss_of
from mpiddl.observe.events import recorder

SMALL, MANY = 200, 1000
"""Parameters of two models; what a backward costs as a whole drops out of the difference."""
LENGTH, BUCKET_BYTES = 16, 320
REPEATS, WARMUP = 40, 5
IDLE_SECONDS = 10
MIB = 1 << 20


class Parameters(torch.nn.Module):
    """Many small parameters and next to no computing."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(LENGTH)) for _ in range(count)
        )

    def forward(self) -> torch.Tensor:
        return torch.stack([(part * 1.0).sum() for part in self.parts]).sum()


def hooked(count: int) -> torch.nn.Module:
    """With an empty Python hook on every parameter."""
    model = Parameters(count)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: None)
    return model


def backward_seconds(model: torch.nn.Module, fresh: bool) -> float:
    """Of one backward."""
    if fresh:
        model.zero_grad()
    loss = model()
    mpiddl.barrier()
    began = time.perf_counter()
    loss.backward()
    return time.perf_counter() - began


def scheduling(fresh: bool) -> str:
    """Microseconds per parameter and per bucket."""
    one = {"bucket_size": "64MiB", "engine": "inline"}
    models = {
        "empty small": hooked(SMALL),
        "empty": hooked(MANY),
        "one small": mpiddl.DataParallel(Parameters(SMALL), **one),
        "one": mpiddl.DataParallel(Parameters(MANY), **one),
        "many": mpiddl.DataParallel(Parameters(MANY), bucket_size=BUCKET_BYTES, engine="inline"),
    }
    times = {name: [] for name in models}
    for repeat in range(WARMUP + REPEATS):
        for name, model in models.items():
            seconds = backward_seconds(model, fresh)
            if repeat >= WARMUP:
                times[name].append(seconds * 1e6)
    took = {name: float(numpy.median(each)) for name, each in times.items()}
    small, large = took["one small"] - took["empty small"], took["one"] - took["empty"]
    buckets = len(models["many"].plan.buckets)
    parameter = (large - small) / (MANY - SMALL)
    bucket = (took["many"] - took["one"]) / (buckets - 1)
    return f"{parameter:.1f} us a parameter beyond an empty hook, {bucket:.0f} us a bucket"


def idle(engine: str) -> str:
    """Processor time while the main thread sleeps."""
    model = mpiddl.DataParallel(torch.nn.Linear(500, 500), engine=engine)
    for _ in range(5):
        model(torch.ones(4, 500)).sum().backward()
    began = time.process_time()
    time.sleep(IDLE_SECONDS)
    return f"{(time.process_time() - began) / IDLE_SECONDS:.2%} of a core"


def resident() -> float:
    """MiB of this process; memory that ranks share counts for each in part."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) / 1024


def train(model: torch.nn.Module, layer: torch.nn.Linear) -> float:
    """The most that is resident at the end of a backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs = torch.ones(64, layer.in_features)
    most = 0.0
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs).sum().backward()
        most = max(most, resident())
        optimizer.step()
    return most


def alone(model: torch.nn.Sequential) -> float:
    """Resident with a single process's gradients, which are gone again."""
    most = train(model, model[0])
    model.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)
    return most


def memory(model: torch.nn.Sequential, before: float) -> str:
    """What training takes beyond that of a single process, MPI included."""
    most = train(mpiddl.DataParallel(model, engine="inline"), model[0])
    gradients = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    return f"{most - before:.0f} MiB beyond a single process; gradients are {gradients:.0f} MiB"


def tracing(world: mpiddl.World) -> str:
    """What a trace adds to the steps of a small language model; to be measured last."""
    spec = DEFAULTS["transformer"]
    folder = mpiddl.broadcast_json(tempfile.mkdtemp() if world.rank == 0 else None)
    model = mpiddl.DataParallel(build(spec), engine="inline", trace=folder)
    ((inputs, targets),) = batches(spec, world.rank, 1)
    times = {True: [], False: []}
    for repeat in range(WARMUP + REPEATS):
        for traced in times if repeat % 2 else reversed(times):
            mpiddl.barrier()
            recorder.tracing = traced
            began = time.process_time()
            model.zero_grad()
            loss_of(spec, model(inputs), targets).backward()
            if repeat >= WARMUP:
                times[traced].append(time.process_time() - began)
    recorder.tracing = True
    mpiddl.barrier()
    if world.rank == 0:
        shutil.rmtree(folder)
    ratios = numpy.array(times[True]) / numpy.array(times[False])
    low, middle, high = numpy.quantile(ratios, (0.25, 0.5, 0.75)) - 1
    return f"{middle:.1%} of a step's processor time, quartiles {low:.1%} and {high:.1%}"


def main() -> None:
    """Print all of it on rank 0."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(6)))
    before = alone(model)
    world = mpiddl.init()
    lines = [f"memory          {memory(model, before)}"]
    lines += [f"fresh           {scheduling(True)}", f"in place        {scheduling(False)}"]
    engines = ["inline", *(["thread"] if world.allows_threads else [])]
    lines += [f"idle, {engine:<9} {idle(engine)}" for engine in engines]
    lines += [f"trace           {tracing(world)}"]
    if world.rank == 0:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
