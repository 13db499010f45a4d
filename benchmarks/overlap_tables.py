"""The tables of one run of benchmarks/overlap.py."""

from __future__ import annotations

from typing import Any

__all__ = ["overlap_tables"]

Line = dict[str, str]
PEER = "ddp"


def overlap_tables(report: dict[str, Any]) -> list[tuple[str, list[Line]]]:
    """A title and lines for each model."""
    tables = []
    for model in report["models"]:
        rows = {r["candidate"]: r for r in report["rows"] if r["model"] == model["name"]}
        sizes = ", ".join(f"{word} {model[word]}" for word in ("width", "layers", "batch"))
        gradients = f"{model['gradient_bytes'] / 1e6:.1f} MB of gradients"
        limits, limit = _limits(report, model, rows)
        title = f"{model['name']}, {sizes} a rank, {gradients}{limits}"
        tables.append((title, [_line(row, rows, limit) for row in rows.values()]))
    if len(tables) > 1 and any(row["candidate"] == PEER for row in report["rows"]):
        tables.append(("All models together", _together(report)))
    return tables


def _limits(
    report: dict[str, Any], model: dict[str, Any], rows: dict[str, Any]
) -> tuple[str, float | None]:
    """Across hosts: computing and the wire, and the longer of both, which no step can beat."""
    goodput = report["environment"].get("tcp_gbps")
    if goodput is None:
        return "", None
    ranks = rows["none"]["ranks"]
    wire = model["gradient_bytes"] * 2 * (ranks - 1) / ranks / goodput / 1e9
    compute = rows["none"]["seconds"]
    return f"; computing {_ms(compute)} ms, wire {_ms(wire)} ms", max(compute, wire)


def _line(row: dict[str, Any], rows: dict[str, Any], limit: float | None) -> Line:
    alone = row["candidate"] == "none"
    exposed = f"{_ms(row['exposed'])} ({_ms(row['exposed_low'])} to {_ms(row['exposed_high'])})"
    line = {
        "": row["candidate"],
        "step, ms": _ms(row["seconds"]),
        "exposed, ms (90 %)": "" if alone else exposed,
        "hidden": "" if row["hidden"] is None else f"{row['hidden']:.2f}",
    }
    if PEER in rows:
        line["exposed / ddp's"] = "" if alone else _ratio(row["exposed"], rows[PEER]["exposed"])
    if limit is not None:
        line["step / longer of computing and wire"] = f"{row['seconds'] / limit:.2f}"
    line["samples/s"] = f"{row['samples_per_second']:,.0f}"
    for name, part in (("processor", "cpu"), ("kernel", "system"), ("other threads", "beside")):
        line[f"{name}, ms"] = _ms(row[part])
    return line


def _together(report: dict[str, Any]) -> list[Line]:
    sums: dict[str, float] = {}
    for row in report["rows"]:
        sums[row["candidate"]] = sums.get(row["candidate"], 0.0) + row["exposed"]
    return [
        {"": name, "exposed, ms": _ms(sum_), "exposed / ddp's": _ratio(sum_, sums[PEER])}
        for name, sum_ in sums.items()
        if not name.startswith("none")
    ]


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs > 0 else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"
