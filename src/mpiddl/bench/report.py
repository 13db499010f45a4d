"""A benchmark's results as a table, JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from mpiddl.base.units import format_bytes
from mpiddl.bench.bandwidth import Row

__all__ = ["HEADINGS", "headline", "line_of", "memory_lines", "write_csv", "write_json"]

_WIDTHS = {
    "size": 7,
    "count": 10,
    "type": 8,
    "redop": 5,
    "algorithm": 12,
    "memory": 12,
    "time(us)": 11,
    "p99(us)": 11,
    "algbw": 7,
    "busbw": 7,
    "#wrong": 6,
    "limit": 6,
}
_LEFT = ("type", "redop", "algorithm", "memory")


def _join(cells: Sequence[str]) -> str:
    columns = zip(_WIDTHS.items(), cells, strict=True)
    return "  ".join(
        cell.ljust(width) if name in _LEFT else cell.rjust(width) for (name, width), cell in columns
    )


HEADINGS = _join(list(_WIDTHS))


def line_of(row: Row, limit: float | None) -> str:
    """A line under HEADINGS; ``limit`` is the busbw that memory allows.

    The memory is that of the buffer; on a GPU, if messages are sent, with their staging.
    """
    count = row.nbytes // getattr(torch, row.dtype).itemsize
    memory = row.placement if row.staging is None else f"{row.placement}/{row.staging}"
    cells = [format_bytes(row.nbytes), str(count), row.dtype, row.op, row.algorithm, memory]
    cells += [f"{row.seconds * 1e6:.1f}", f"{row.seconds_p99 * 1e6:.1f}"]
    cells += [_gbps(row.algbw), _gbps(row.busbw)]
    cells += ["-" if row.wrong is None else str(row.wrong)]
    cells += ["-" if limit is None else f"{limit:.1f}"]
    return _join(cells)


def _gbps(value: float) -> str:
    """Two decimals, more for a slow network."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def headline(environment: dict[str, Any]) -> str:
    """Where the numbers come from, in two lines."""
    first = environment["ranks"][0]
    versions = first["versions"]
    threads = sorted({rank["torch_threads"] for rank in environment["ranks"]})
    cores = sorted({len(rank["cores"]) for rank in environment["ranks"]})
    return (
        f"# mpiddl {versions['mpiddl']}, {environment['mpi']}, torch {versions['torch']}\n"
        f"# {len(environment['ranks'])} rank(s) on {len(environment['hosts'])} node(s), "
        f"{_spread(cores)} core(s) and {_spread(threads)} thread(s) a rank, {first['cpu']}"
    )


def memory_lines(memory: dict[str, Any]) -> str:
    """What was measured of the host's memory and of the GPUs'."""
    lines = [f"# memory: {memory['stream_gbps']:.1f} GB/s, c = a + b on all ranks of a node"]
    if "copy_gbps" in memory:
        peer = memory["peer_gbps"]
        mapped = "cannot be mapped" if peer is None else f"{peer:.1f} GB/s"
        lines.append(
            f"# GPU memory: {memory['copy_gbps']:.1f} GB/s copied within, all ranks of a node; "
            f"a peer's {mapped}, the host's {memory['pcie_gbps']:.1f} GB/s, each way for each rank"
        )
    return "\n".join(lines)


def _spread(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def write_json(
    path: Path, environment: dict[str, Any], rows: Sequence[Row], memory: dict[str, Any]
) -> None:
    """One object: environment, rows, memory."""
    report = {"environment": environment, "rows": [row.as_dict() for row in rows], "memory": memory}
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line per row under the names of JSON's keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)
