"""``mpiddl trace``: what the ranks of a job did and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mpiddl.cli.outputs import check_picture
from mpiddl.cli.run import deferred

__all__ = ["app", "merge", "plot", "show"]

app = typer.Typer(
    help="What the ranks of a job did and when: MPIDDL_TRACE=DIR writes it, and a job that failed "
    "leaves its last events.",
    no_args_is_help=True,
)


def merge(
    folder: Annotated[Path, typer.Argument(help="What MPIDDL_TRACE named.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="For Perfetto or chrome://tracing.")
    ] = Path("run.json"),
) -> None:
    """Make one trace of all ranks, their clocks aligned."""
    from mpiddl.trace import chrome as trace

    recordings = trace.read_folder(folder)
    merged = trace.merge(recordings)
    _write(output, json.dumps(merged))
    for problem in merged["otherData"]["problems"]:
        typer.echo(f"note: {problem}", err=True)
    missing = (merged["otherData"]["size"] or 0) - len(recordings)
    if missing > 0:
        typer.echo(f"note: {missing} of the job's ranks are not in {folder}", err=True)
    typer.echo(f"written to {output}; open it at https://ui.perfetto.dev")


def plot(
    trace_file: Annotated[
        Path,
        typer.Argument(metavar="RUN.JSON", help="What merge wrote, or a folder that it reads."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG, PDF or SVG.")] = Path(
        "run.png"
    ),
    step: Annotated[
        str,
        typer.Option(
            callback=lambda text: _check_steps(text), help="5, or 5:7; default a typical one."
        ),
    ] = "",
) -> None:
    """Draw a step: forward, backward, what flew meanwhile, what was waited for."""
    from mpiddl.errors import OutputError
    from mpiddl.trace import chrome as trace
    from mpiddl.trace import timeline

    check_picture(output)
    steps = timeline.choose_steps(trace.read_trace(trace_file), _steps_in(step))
    try:
        timeline.plot_timeline(output, steps)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}") from None
    typer.echo(f"written to {output}")


def show(
    path: Annotated[Path, typer.Argument(help="A folder of recordings, or one of them.")],
    last: Annotated[int, typer.Option(min=1, max=1 << 30, help="Events a rank.")] = 20,
) -> None:
    """Print what each rank did last."""
    from mpiddl.trace import chrome as trace

    for line in trace.lines_of(trace.read_folder(path), last):
        typer.echo(line)


def _write(path: Path, text: str) -> None:
    from mpiddl.errors import OutputError

    try:
        path.write_text(text)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; pass -o") from None


def _steps_in(text: str) -> range:
    """``"5:7"`` -> 5, 6, 7."""
    first, _, last = text.partition(":")
    return range(int(first), int(last or first) + 1) if text else range(0)


def _check_steps(text: str) -> str:
    try:
        if text and (not _steps_in(text) or _steps_in(text)[0] < 0):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a step; write 5, or 5:7") from None
    return text


app.command("merge")(deferred(merge))
app.command("plot")(deferred(plot))
app.command("show")(deferred(show))
