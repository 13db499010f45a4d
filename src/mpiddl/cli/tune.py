"""``mpiddl tune``: measure this cluster once, so that ``auto`` need not guess."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpiddl.base.units import format_bytes, parse_sizes
from mpiddl.cli.arguments import MOST_ROUNDS, Device, check_sizes, init_on

if TYPE_CHECKING:
    from mpiddl.bench.bandwidth import Row
    from mpiddl.comm.world import World

__all__ = ["tune"]


def tune(
    sizes: Annotated[
        str, typer.Option(callback=check_sizes, help="As for `mpiddl bench`.")
    ] = "1KiB:64MiB",
    repeats: Annotated[
        int, typer.Option(min=1, max=MOST_ROUNDS, help="Timed rounds; the median counts.")
    ] = 9,
    device: Device = "cpu",
    file: Annotated[
        Path | None, typer.Option(help="Default MPIDDL_TUNE, else in the user's cache folder.")
    ] = None,
) -> None:
    """Find the fastest all-reduce for each size on these ranks, and remember it for `auto`.

    Run it once with the number of hosts and ranks per host that jobs will have, and on the kind of
    device. The file is read when a job starts, by rank 0, for all.
    """
    from mpiddl.api.objects import broadcast_json
    from mpiddl.bench.tune import tune as measured
    from mpiddl.comm.tuning import cluster_name
    from mpiddl.errors import OutputError

    world = init_on(device)
    speaks = world.rank == 0
    rows = []
    if speaks:
        typer.echo(f"# {cluster_name(world.layout, world.device.type)}")
        typer.echo(f"{'size':>8}  {'algorithm/chunk':<24}  {'time(us)':>10}  {'busbw':>7}")
    for row in measured(world, parse_sizes(sizes), repeats):
        rows.append(row)
        if speaks:
            name, _, chunk = row.algorithm.partition("/")
            way = f"{name}/{format_bytes(int(chunk))}"
            line = f"{way:<24}  {row.seconds * 1e6:>10.1f}  {row.busbw:>7.2f}"
            typer.echo(f"{format_bytes(row.nbytes):>8}  {line}")
    problem = _conclude(world, rows, file) if speaks else None
    problem = broadcast_json(problem)
    if problem:
        raise OutputError(problem)


def _conclude(world: World, rows: Sequence[Row], file: Path | None) -> str | None:
    """On rank 0: say what is fastest and write it; what went wrong."""
    from mpiddl.bench.tune import choices_of
    from mpiddl.comm.tuning import cluster_name, tune_file, write_choices

    path = file or tune_file(world.settings.tune)
    choices = choices_of(rows)
    for choice in choices:
        border = "any size" if choice.up_to is None else f"up to {format_bytes(choice.up_to)}"
        typer.echo(f"{border}: {choice.algorithm}, chunks of {format_bytes(choice.chunk_bytes)}")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    try:
        cluster = cluster_name(world.layout, world.device.type)
        write_choices(path, cluster, today, choices)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}; pass --file"
    typer.echo(f"written to {path}")
    return None
