"""``mpiddl bench overlap``: how much of the gradient exchange do training steps feel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpiddl.base.units import parse_bytes
from mpiddl.cli.arguments import MOST_ROUNDS, Device, init_on
from mpiddl.cli.outputs import refuse_files, write_files
from mpiddl.cli.run import let_rank_0_speak
from mpiddl.launch.exit import LeaveTogether

if TYPE_CHECKING:
    from mpiddl.bench.models import ModelSpec
    from mpiddl.bench.overlap import Plan, Row
    from mpiddl.bench.overlap_candidates import Options, Others
    from mpiddl.comm.world import World

__all__ = ["overlap"]

DEFAULT_ENGINES = "inline,after,thread"
MOST_WIDTH, MOST_LAYERS = 1 << 20, 1000
MEASURING_STEPS = 30
"""Enough for ``DataParallel`` to find out bucket size and engine."""


def _check_bytes(text: str | None) -> str | None:
    try:
        if text is not None and parse_bytes(text) < 1:
            raise ValueError(f"{text!r} is not positive")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _check_bucket_size(text: str | None) -> str | None:
    return text if text == "auto" else _check_bytes(text)


def _some_of(table: str) -> Callable[[str | None], str | None]:
    def check(text: str | None) -> str | None:
        from mpiddl.bench.models import DEFAULTS
        from mpiddl.bench.overlap_candidates import ENGINES, NAMES

        known = {"model": tuple(DEFAULTS), "engine": ENGINES, "candidates": NAMES}[table]
        for name in text.split(",") if text is not None else ():
            if name not in known:
                raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
        return text

    return check


Model = Annotated[
    str | None,
    typer.Option(
        callback=_some_of("model"),
        help="Default mlp,cnn,transformer; on GPUs mlp,cnn,transformer-large.",
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        callback=_some_of("candidates"),
        help="Beside none and after; default none/again,mpiddl,next,ddp, and horovod or, on GPUs, "
        "ddp/nccl; also ddp/views.",
    ),
]
Engine = Annotated[
    str,
    typer.Option(callback=_some_of("engine"), help="Of mpiddl and next: inline,after,thread,auto."),
]
Width = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_WIDTH, help="Features, or channels of the CNN's first stage."),
]
Layers = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_LAYERS, help="Linear layers, stages of the CNN, transformer blocks."
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, max=MOST_WIDTH, help="Samples of one rank.")]
Context = Annotated[
    int | None, typer.Option(min=1, max=MOST_WIDTH, help="Tokens, for the transformer.")
]
BucketSize = Annotated[
    str | None, typer.Option(callback=_check_bucket_size, help="mpiddl's; default its own.")
]
DdpBucketSize = Annotated[
    str | None, typer.Option(callback=_check_bytes, help="torch DDP's; default its own.")
]
Repeats = Annotated[int, typer.Option(min=1, max=MOST_ROUNDS, help="Rounds; the median counts.")]
Warmup = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MOST_ROUNDS,
        help="Steps of each candidate before those; default 8, with auto 30.",
    ),
]
Steps = Annotated[
    int, typer.Option(min=1, max=MOST_ROUNDS, help="Steps of a candidate in a round.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write environment, models and rows.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw exposed time, PNG.")]


def overlap(
    model: Model = None,
    candidates: Candidates = None,
    engine: Engine = DEFAULT_ENGINES,
    device: Device = "cpu",
    width: Width = None,
    layers: Layers = None,
    batch: Batch = None,
    context: Context = None,
    bucket_size: BucketSize = None,
    ddp_bucket_size: DdpBucketSize = None,
    repeats: Repeats = 15,
    warmup: Warmup = None,
    steps: Steps = 3,
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """Train models with and without exchange of gradients, and with other libraries.

    Candidates take turns in random order. `none` exchanges nothing, `after` everything when
    backward is over, `mpiddl` while backward runs, `next` also while the next forward runs; `ddp`
    is torch's DistributedDataParallel on gloo, `ddp/nccl` on NCCL. Exposed is what a step takes
    longer than without exchange, hidden the part of `after`'s that a candidate does not expose;
    what `none/again` exposes is noise. On a GPU a step ends when its stream has done all. Exits 1
    if their parameters differ in the end.
    """
    from mpiddl.bench import models, overlap_candidates
    from mpiddl.bench.overlap import Plan
    from mpiddl.bench.overlap_candidates import Options, Others, expanded

    kind = device.partition(":")[0]
    wanted = candidates is not None or engine != DEFAULT_ENGINES
    names = expanded((candidates or overlap_candidates.USUAL[kind]).split(","), engine.split(","))
    sizes = {"width": width, "layers": layers, "batch": batch, "context": context}
    given: dict[str, Any] = {size: value for size, value in sizes.items() if value is not None}
    chosen = (model or models.USUAL[kind]).split(",")
    specs = [dataclasses.replace(models.DEFAULTS[name], **given) for name in chosen]
    ddp_bytes = None if ddp_bucket_size is None else parse_bytes(ddp_bucket_size)
    options = Options(bucket_size, ddp_bytes)
    world = init_on(device)
    refuse_files(json_file, plot_file, plot=plot_file)
    if warmup is None:
        warmup = MEASURING_STEPS if "auto" in (bucket_size, *engine.split(",")) else 8
    report = _Report(world, options, Plan(repeats, warmup, steps))
    others = Others(world)
    for spec in specs:
        _measure(spec, names, wanted, others, report)
    report.end(json_file, plot_file)


def _measure(
    spec: ModelSpec, names: list[str], wanted: bool, others: Others, report: _Report
) -> None:
    """Rows of one model; an error if a candidate was ``wanted`` by name and cannot run."""
    from mpiddl.bench.memory import check_room
    from mpiddl.bench.models import nbytes_of
    from mpiddl.bench.overlap import measure
    from mpiddl.bench.overlap_candidates import candidates
    from mpiddl.errors import PeerError

    # Each candidate has parameters and gradients of its own.
    check_room(2 * len(names) * nbytes_of(spec), f"{spec.name} of this size", report.world)
    found, missing = candidates(names, spec, report.options, others, report.world)
    for reason in missing.values():
        if wanted:
            raise PeerError(reason)
        report.leave_out(reason)
    report.begin(spec)
    report.add(measure(spec, found, report.world, report.plan))


class _Report:
    """What rank 0 prints and writes."""

    def __init__(self, world: World, options: Options, plan: Plan) -> None:
        from mpiddl.bench.report import headline
        from mpiddl.doctor.environment import environment_of

        self.world, self.options, self.plan = world, options, plan
        self._environment = environment_of(world)
        self._models: list[dict[str, Any]] = []
        self._rows: list[Row] = []
        self._left_out: set[str] = set()
        self.say(headline(self._environment))

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.rank == 0:
            typer.echo(text)

    def leave_out(self, reason: str) -> None:
        """Say once why a candidate is not there."""
        if reason not in self._left_out:
            self.say(f"# left out: {reason}")
        self._left_out.add(reason)

    def begin(self, spec: ModelSpec) -> None:
        from mpiddl.bench.overlap_report import HEADINGS, describe_model

        facts = describe_model(spec)
        self._models.append(facts)
        sizes = f"width {spec.width}, layers {spec.layers}, batch {spec.batch} a rank"
        gradients = f"{facts['gradient_bytes'] / 1e6:.1f} MB of gradients"
        place = self.world.device.type
        self.say(f"\n# {spec.name} on {place}: {sizes}; {gradients} in {facts['tensors']} tensors")
        self.say(HEADINGS)

    def add(self, rows: list[Row]) -> None:
        from mpiddl.bench.overlap_report import line_of

        self._rows += rows
        for row in rows:
            self.say(line_of(row))

    def end(self, json_file: Path | None, plot_file: Path | None) -> None:
        """Write what was asked for; exit 1 on every rank if results differ."""
        from mpiddl.bench.overlap_report import problems, ratios, write_json
        from mpiddl.bench.plots import plot_overlap

        for line in ["", *ratios(self._rows)]:
            self.say(line)
        plan = {**dataclasses.asdict(self.plan), **dataclasses.asdict(self.options)}
        plan["device"] = self.world.device.type
        title = f"{self.world.size} ranks, {self._environment['mpi']}"
        writers: dict[Path | None, Callable[[Path], None]] = {
            json_file: lambda path: write_json(
                path, self._environment, self._models, plan, self._rows
            ),
            plot_file: lambda path: plot_overlap(path, self._rows, title),
        }
        write_files(writers)
        found = problems(self._rows)
        for problem in found:
            self.say(f"FAILED: {problem}")
        if found:
            let_rank_0_speak()
            raise LeaveTogether(1)
