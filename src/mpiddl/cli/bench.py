"""``mpiddl bench``: how fast are collectives on these ranks, and are they right.

Its ``overlap``, which trains models, is in bench_overlap.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpiddl.base.units import parse_sizes
from mpiddl.cli import bench_overlap
from mpiddl.cli.arguments import MOST_ROUNDS, Device, check_sizes, finite, init_on
from mpiddl.cli.outputs import refuse_files, write_files
from mpiddl.cli.run import deferred, let_rank_0_speak
from mpiddl.launch.exit import LeaveTogether

if TYPE_CHECKING:
    from mpiddl.bench.bandwidth import Plan, Row
    from mpiddl.bench.candidates import Candidate
    from mpiddl.comm.world import World

__all__ = ["app"]

DEFAULT_ALGORITHMS = "auto,library,gloo"
STAGINGS = ("device", "host")

app = typer.Typer(
    help="Time collectives or training on these ranks and check results: run under mpirun or srun.",
    no_args_is_help=True,
)


def _one_of(table: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        from mpiddl.collectives.reduction import DTYPES, OPS

        known = OPS if table == "op" else [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        for name in text.split(",") if table == "dtype" else [text]:
            if name not in known:
                raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
        return text

    return check


def _check_staging(text: str) -> str:
    for name in text.split(",") if text else []:
        if name not in STAGINGS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(STAGINGS)}")
    return text


Sizes = Annotated[
    str, typer.Option(callback=check_sizes, help="1KiB:256MiB in steps of 4, or 64KiB,1MiB,...")
]
Algorithms = Annotated[str, typer.Option(help="Comma-separated, or `all`.")]
Dtype = Annotated[
    str, typer.Option(callback=_one_of("dtype"), help="Of the elements; comma-separated.")
]
Op = Annotated[str, typer.Option(callback=_one_of("op"), help="sum, mean, min, max or prod.")]
Staging = Annotated[
    str,
    typer.Option(
        callback=_check_staging,
        help="How a GPU's messages go: device,host measures both; default as in training.",
    ),
]
Repeats = Annotated[
    int, typer.Option(min=1, max=MOST_ROUNDS, help="Timed rounds; the median counts.")
]
Warmup = Annotated[int, typer.Option(min=0, max=MOST_ROUNDS, help="Rounds before that.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Count wrong elements.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Write buffers before each call, outside of the time.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write environment and rows.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write rows.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw busbw and time, PNG.")]
MinBusbw = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=finite,
        help="Exit 1 if `auto` is below this (GB/s) at the largest size: for acceptance.",
    ),
]


def _command(collective: str) -> Callable[..., None]:
    def bench(
        sizes: Sizes = "1KiB:256MiB",
        algorithms: Algorithms = DEFAULT_ALGORITHMS,
        dtype: Dtype = "float32",
        op: Op = "sum",
        device: Device = "cpu",
        staging: Staging = "",
        repeats: Repeats = 15,
        warmup: Warmup = 3,
        check: Check = True,
        fresh: Fresh = False,
        json_file: Json = None,
        csv_file: Csv = None,
        plot_file: Plot = None,
        min_busbw: MinBusbw = None,
    ) -> None:
        from mpiddl.bench.bandwidth import Plan
        from mpiddl.errors import PeerError

        names = _names(algorithms, collective)
        ways = staging.split(",") if staging else []
        if ways and device == "cpu":
            raise PeerError("--staging is about GPU memory: add --device cuda")
        plan = Plan(repeats, warmup, check, fresh)
        world = init_on(device)
        refuse_files(json_file, csv_file, plot_file, plot=plot_file)
        report = _Report(world)
        report.begin(*_memory(world, collective))
        nbytes = parse_sizes(sizes)
        wanted = algorithms not in ("all", DEFAULT_ALGORITHMS)
        found = _candidates(names, wanted, collective, max(nbytes), ways, world, report)
        for size in nbytes:
            for kind in dtype.split(","):
                _measure(collective, size, kind, op, found, plan, world, report)
        report.write(json_file, csv_file, plot_file, f"{collective}, {dtype}")
        report.judge(min_busbw)

    bench.__doc__ = f"Time {collective}. busbw as in nccl-tests, GB = 1e9 bytes."
    return bench


for _name in ("all-reduce", "reduce-scatter", "all-gather", "broadcast", "all-to-all"):
    app.command(_name)(deferred(_command(_name)))
app.command("overlap")(deferred(bench_overlap.overlap))


def _names(text: str, collective: str) -> list[str]:
    from mpiddl.bench.lineup import names_of
    from mpiddl.bench.sendrecv import SENDRECV
    from mpiddl.errors import PeerError

    known = names_of(collective)
    names = [name for name in known if name != SENDRECV] if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise PeerError(f"no algorithm {name!r} for {collective}; valid are {', '.join(known)}")
    return names


def _memory(world: World, collective: str) -> tuple[dict[str, Any], float | None]:
    """What was measured of it, and the busbw that it allows, where one is known."""
    from mpiddl.bench.gpu_memory import gpu_busbw_limit, measure_gpu_memory
    from mpiddl.bench.memory import busbw_limit, measure_memory
    from mpiddl.devices.registry import device_at

    memory = measure_memory(world)
    on_gpu = device_at(world.device).late
    if on_gpu:
        memory |= measure_gpu_memory(world)
    limit = None
    if collective == "all-reduce" and world.num_nodes == 1 and world.size > 1:
        limit = busbw_limit(memory["stream_gbps"], world.size)
        if on_gpu:
            limit = gpu_busbw_limit(memory, world.size, world.gpu_sharers)
    return memory | {"limit_gbps": limit}, limit


def _candidates(
    names: list[str],
    wanted: bool,
    collective: str,
    nbytes: int,
    stagings: list[str],
    world: World,
    report: _Report,
) -> list[Candidate]:
    """Those that can run here; an error if one was ``wanted`` by name and cannot."""
    from mpiddl.bench.lineup import candidates, stagings_of
    from mpiddl.bench.sendrecv import SENDRECV
    from mpiddl.errors import PeerError

    ways, impossible = stagings_of(world, stagings)
    found, missing = candidates(names, collective, nbytes, world, ways)
    for reason in missing.values():
        if wanted:
            raise PeerError(reason)
    for reason in [*impossible, *missing.values()]:
        report.say(f"# left out: {reason}")
    if SENDRECV in names:
        report.say(f"# {SENDRECV} is no all-reduce: as many bytes to a neighbour as on the ring")
    return found


def _measure(
    collective: str,
    nbytes: int,
    dtype: str,
    op: str,
    found: list[Candidate],
    plan: Plan,
    world: World,
    report: _Report,
) -> None:
    import torch

    from mpiddl.bench.bandwidth import measure
    from mpiddl.bench.candidates import Case

    kind = getattr(torch, dtype)
    case = Case(collective, nbytes // kind.itemsize * kind.itemsize, kind, op)
    for row in measure(case, found, world, plan):
        if isinstance(row, str):
            report.say(f"# {row}")
        else:
            report.add(row)


class _Report:
    """What rank 0 prints and writes."""

    def __init__(self, world: World) -> None:
        from mpiddl.doctor.environment import environment_of

        self._speaks = world.rank == 0
        self._environment = environment_of(world)
        self._memory: dict[str, Any] = {}
        self._limit: float | None = None
        self._rows: list[Row] = []
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        """Print on rank 0, and nothing twice."""
        if self._speaks and text not in self._said:
            typer.echo(text)
        self._said.add(text)

    def begin(self, memory: dict[str, Any], limit: float | None) -> None:
        from mpiddl.bench.report import HEADINGS, headline, memory_lines

        self._memory, self._limit = memory, limit
        self.say(headline(self._environment))
        self.say(memory_lines(memory))
        self.say(HEADINGS)

    def add(self, row: Row) -> None:
        from mpiddl.bench.report import line_of

        self._rows.append(row)
        self.say(line_of(row, self._limit))

    def write(
        self, json_file: Path | None, csv_file: Path | None, plot_file: Path | None, title: str
    ) -> None:
        """Write what was asked for.

        Raises:
            OutputError: On every rank.
        """
        from mpiddl.bench.plots import plot_bandwidth
        from mpiddl.bench.report import write_csv, write_json

        ranks, mpi = len(self._environment["ranks"]), self._environment["mpi"]
        title = f"{title}, {ranks} ranks, {mpi}"
        writers: dict[Path | None, Callable[[Path], None]] = {
            json_file: lambda path: write_json(path, self._environment, self._rows, self._memory),
            csv_file: lambda path: write_csv(path, self._rows),
            plot_file: lambda path: plot_bandwidth(path, self._rows, self._limit, title),
        }
        write_files(writers)

    def judge(self, min_busbw: float | None) -> None:
        """Exit 1 on every rank if results are wrong or too slow."""
        problems = [
            f"{row.algorithm} is wrong at {row.nbytes} bytes" for row in self._rows if row.wrong
        ]
        if min_busbw is not None:
            largest = max((row.nbytes for row in self._rows), default=0)
            judged = [r for r in self._rows if r.algorithm == "auto" and r.nbytes == largest]
            if not judged:
                problems.append("--min-busbw judges auto, which was not measured")
            problems += [
                f"auto, {row.placement}: busbw {row.busbw:.2f} is below {min_busbw} GB/s"
                for row in judged
                if not row.busbw >= min_busbw
            ]
        for problem in problems:
            self.say(f"FAILED: {problem}")
        if problems:
            let_rank_0_speak()
            raise LeaveTogether(1)
