"""``mpiddl`` and ``python -m mpiddl``."""

from __future__ import annotations

from typing import Annotated

import typer

import mpiddl
from mpiddl.cli import bench, data, doctor, slurm, trace, tune
from mpiddl.cli.run import deferred, run

__all__ = ["app", "main"]

app = typer.Typer(
    name="mpiddl",
    help="Data-parallel PyTorch training on MPI clusters.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("doctor")(deferred(doctor.doctor))
app.command("slurm", context_settings=slurm.CONTEXT)(deferred(slurm.slurm))
app.command("tune")(deferred(tune.tune))
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(trace.app, name="trace")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mpiddl {mpiddl.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Data-parallel PyTorch training on MPI clusters."""


def main() -> None:
    """Entry point."""
    run(app)
