"""An overlap benchmark's rows as a table and JSON."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mpiddl.bench.models import ModelSpec, build
from mpiddl.bench.overlap import BASELINE, TOLERANCE, Row

__all__ = ["HEADINGS", "PEER", "describe_model", "line_of", "problems", "ratios", "write_json"]

PEER = "ddp"
PEERS = (PEER, "ddp/nccl")
"""What mpiddl is to replace."""

_WIDTHS = {
    "candidate": 15,
    "step(ms)": 9,
    "exposed(ms)": 11,
    "90 % interval": 17,
    "hidden": 7,
    "samples/s": 9,
    "cpu(ms)": 8,
    "system(ms)": 10,
    "beside(ms)": 10,
    "deviation": 9,
}


def _join(cells: Sequence[str]) -> str:
    pairs = zip(_WIDTHS.items(), cells, strict=True)
    return "  ".join(
        cell.ljust(width) if name == "candidate" else cell.rjust(width)
        for (name, width), cell in pairs
    )


HEADINGS = _join(list(_WIDTHS))


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """The model's sizes, and how many bytes its gradients have."""
    with torch.device("meta"):
        parameters = list(build(spec).parameters())
    facts = {"parameters": sum(p.numel() for p in parameters), "tensors": len(parameters)}
    return {**spec.as_dict(), **facts, "gradient_bytes": sum(p.nbytes for p in parameters)}


def line_of(row: Row) -> str:
    """A line under HEADINGS."""
    exposed, interval = "-", "-"
    if row.candidate != BASELINE:
        exposed = _ms(row.exposed)
        interval = f"{_ms(row.exposed_low)} to {_ms(row.exposed_high)}"
    cells = [row.candidate, _ms(row.seconds), exposed, interval]
    cells += ["-" if row.hidden is None else f"{row.hidden:.0%}", f"{row.samples_per_second:,.1f}"]
    cells += [_ms(row.cpu), _ms(row.system), _ms(row.beside)]
    cells += ["-" if row.deviation is None else f"{row.deviation:.0e}"]
    return _join(cells)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def ratios(rows: Sequence[Row]) -> list[str]:
    """What candidates expose over what torch DDP does, for each model and over all of them."""
    exposed: dict[str, dict[str, float]] = {}
    for row in rows:
        exposed.setdefault(row.candidate, {})[row.model] = row.exposed
    lines = []
    for peer, name in itertools.product(PEERS, exposed):
        ours, theirs = exposed[name], exposed.get(peer, {})
        if name.startswith(BASELINE) or name in PEERS or ours.keys() != theirs.keys():
            continue
        shares = {model: _share(ours[model], theirs[model]) for model in ours}
        if len(ours) > 1:
            shares["together"] = _share(sum(ours.values()), sum(theirs.values()))
        found = ", ".join(f"{model} {share:.2f}" for model, share in shares.items())
        lines.append(f"exposed by {name} / by {peer}: {found}")
    return lines


def _share(ours: float, theirs: float) -> float:
    return ours / theirs if theirs > 0 else math.nan


def problems(rows: Sequence[Row]) -> list[str]:
    """Who computes something else than the others."""
    return [
        f"{row.model}: parameters of {row.candidate} differ from those of {row.agrees_with} by "
        f"{row.deviation:.1e} of what training changed"
        for row in rows
        if row.deviation is not None and not row.deviation <= TOLERANCE
    ]


def write_json(
    path: Path,
    environment: dict[str, Any],
    models: Sequence[dict[str, Any]],
    plan: dict[str, Any],
    rows: Sequence[Row],
) -> None:
    """One object: environment, plan, models, rows."""
    report = {"environment": environment, "plan": plan, "models": list(models)}
    report["rows"] = [row.as_dict() for row in rows]
    path.write_text(json.dumps(report, indent=1) + "\n")
