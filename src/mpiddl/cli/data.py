"""``mpiddl data``: how samples are spread over ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpiddl.cli.outputs import check_picture
from mpiddl.cli.run import deferred

if TYPE_CHECKING:
    from mpiddl.data.shards.plots import Balance
    from mpiddl.data.shards.skewness import Skew

__all__ = ["app", "report"]

MOST_RANKS = 100_000

app = typer.Typer(help="How samples are spread over ranks.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """How samples are spread over ranks."""


def report(
    labels: Annotated[
        Path | None, typer.Option(help="A class for each sample: a 1-D .npy file.")
    ] = None,
    sharding: Annotated[
        str, typer.Option(help="contiguous, strided, random, hash, stratified, grouped, ...")
    ] = "contiguous",
    ranks: Annotated[
        int | None, typer.Option(min=1, max=MOST_RANKS, help="Needed with --labels.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sharding.")] = 0,
    keys: Annotated[Path | None, typer.Option(help="For hash: a 1-D .npy file.")] = None,
    groups: Annotated[Path | None, typer.Option(help="For grouped: a 1-D .npy file.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(callback=lambda text: _check_weights(text), help="For weighted: 2,1,1"),
    ] = None,
    times: Annotated[Path | None, typer.Option(help="What Balancer.save wrote.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG, PDF or SVG.")] = Path(
        "report.png"
    ),
) -> None:
    """Draw samples and classes of each rank, and step times before and after balancing."""
    from mpiddl.data.shards.plots import plot_report
    from mpiddl.errors import DataError, OutputError

    check_picture(output)
    if labels is None and times is None:
        raise DataError("nothing to report: pass --labels FILE.npy, --times FILE.json, or both")
    if labels is not None and ranks is None:
        raise DataError("how many ranks share the samples? pass --ranks")
    skew = None
    if labels is not None and ranks is not None:
        numbers = [float(part) for part in weights.split(",")] if weights else None
        skew = _skew(labels, sharding, ranks, seed, keys, groups, numbers)
        typer.echo(f"{sharding} sharding of {skew.samples.sum():,} samples over {ranks} ranks")
        typer.echo(skew)
    balance = None
    if times is not None:
        balance = _balance_in(times)
        slowest = ", then ".join(f"{seconds * 1e3:.3g} ms" for seconds in balance.slowest)
        typer.echo(f"slowest rank's step: {slowest}")
    try:
        plot_report(output, skew, balance)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}; pass -o") from None
    typer.echo(f"written to {output}")


def _skew(
    labels: Path,
    name: str,
    ranks: int,
    seed: int,
    keys: Path | None,
    groups: Path | None,
    weights: list[float] | None,
) -> Skew:
    """Deal the samples out as the job would."""
    import inspect

    from mpiddl.data.reading.npy import read_npy
    from mpiddl.data.shards.kinds import SHARDINGS, sharding
    from mpiddl.data.shards.skewness import skew_of
    from mpiddl.errors import DataError

    classes = read_npy(labels)
    if classes.ndim != 1:
        raise DataError(f"{labels} must have one dimension, got shape {classes.shape}")
    options: dict[str, Any] = {"seed": seed, "weights": weights}
    options["keys"] = None if keys is None else read_npy(keys)
    options["groups"] = None if groups is None else read_npy(groups)
    if name in SHARDINGS and "labels" in inspect.signature(SHARDINGS[name]).parameters:
        options["labels"] = classes
    dealt = sharding(name, len(classes), **options)
    return skew_of(classes, [dealt.shard(rank, ranks) for rank in range(ranks)])


def _balance_in(path: Path) -> Balance:
    """The first and the last round of a file.

    Raises:
        DataError: It is missing, or was not written by ``Balancer.save``.
    """
    import numpy

    from mpiddl.data.shards.balance import FORMAT
    from mpiddl.data.shards.plots import Balance
    from mpiddl.errors import DataError

    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
        rounds = found["rounds"]
        kept = [rounds[0], rounds[-1]] if len(rounds) > 1 else [rounds[0]]
        shape = (len(kept), found["ranks"])
        shares, seconds = (
            numpy.array([each[name] for each in kept], dtype=numpy.float64)
            for name in ("shares", "seconds")
        )
        if not shares.shape == seconds.shape == shape or not numpy.isfinite(shares + seconds).all():
            raise ValueError("it has not a number for each rank")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, LookupError) as error:
        reason = "rounds or names are missing" if isinstance(error, LookupError) else str(error)
        raise DataError(f"{path} is no file of mpiddl.data.Balancer.save: {reason}") from None
    return Balance(shares, seconds)


def _check_weights(text: str | None) -> str | None:
    try:
        if text is not None and not all(0 < float(part) < math.inf for part in text.split(",")):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of positive numbers; write 2,1,1") from None
    return text


app.command("report")(deferred(report))
