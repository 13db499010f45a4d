"""Writes the tables of docs/performance.md from benchmarks/results/*.json.

    python benchmarks/tables.py

Only what stands between the two comments `tables`, and likewise `gpus` and `overlap`, in that file
is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_tables import NOTHING_YET, gpu_facts, gpu_line
from overlap_tables import overlap_tables
from tabulate import tabulate

from mpiddl.base.units import format_bytes

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
RUNS = {
    "2_ranks_small": "Two ranks on one node, small buffers",
    "2_ranks_large": "Two ranks on one node",
    "2_ranks_fresh": "Two ranks on one node, buffers just written",
    "2_ranks_16_bit": "Two ranks on one node, 16 bits",
    "4_ranks": "Four ranks on the two cores",
    "2_hosts_1gbit": "Two hosts, 1 Gbit/s",
    "4_hosts_200mbit": "Four hosts, 200 Mbit/s",
    "2x2_200mbit_cyclic": "Two hosts of two ranks, 200 Mbit/s, ranks dealt in turn",
}
GPU_RUNS = {
    "one_gpu_each": "Ranks of one node with a GPU each",
    "2_ranks_one_gpu": "Two ranks that share a GPU",
}
OVERLAP_RUNS = {
    "2_ranks": "Two ranks on one node, one thread each",
    "2_ranks_longer": "The same with fewer ways and more rounds",
    "2_hosts_1gbit_batch_2048": "Two hosts, 1 Gbit/s, where computing takes longer",
    "2_hosts_1gbit_batch_512": "Two hosts, 1 Gbit/s, where both take about as long",
    "2_hosts_500mbit_batch_512": "Two hosts, 500 Mbit/s, where the link takes longer",
}
Row = dict[str, Any]


def _key(row: Row) -> tuple[str, str, str]:
    return row["algorithm"], row["placement"], row["dtype"]


def _one_node(report: dict[str, Any], rows: dict[tuple[str, str, str], Row]) -> dict[str, str]:
    """Times and ratios of one size: how many times as fast auto is as the others."""
    cells: dict[str, str] = {}
    ours = {place: rows["auto", place, "float32"] for place in ("empty", "plain")}
    for place, auto in ours.items():
        name = "`mpiddl.empty`" if place == "empty" else "plain"
        library, gloo = rows["library", place, "float32"], rows["gloo", "plain", "float32"]
        cells |= {
            f"{name}, us": f"{auto['seconds'] * 1e6:,.1f}",
            f"{name}: MPI, us": f"{library['seconds'] * 1e6:,.1f}",
            f"{name}: x MPI": f"{library['seconds'] / auto['seconds']:.2f}",
            f"{name}: x gloo": f"{gloo['seconds'] / auto['seconds']:.2f}",
        }
    ranks = ours["empty"]["ranks"]
    limit = report["memory"]["stream_gbps"] * (ranks - 1) / ranks**2
    if ours["empty"]["nbytes"] >= 64 << 20:
        cells["of memory's limit"] = f"{ours['empty']['busbw'] / limit:.2f}"
    if ("ring", "plain", "float32") in rows:
        ring, library = rows["ring", "plain", "float32"], rows["library", "plain", "float32"]
        cells["ring, plain: x MPI"] = f"{library['seconds'] / ring['seconds']:.2f}"
    return cells


def _dtypes(_: dict[str, Any], rows: dict[tuple[str, str, str], Row]) -> dict[str, str]:
    """Time per element over float32's."""
    cells = {}
    for place in ("empty", "plain"):
        wide, narrow = rows["auto", place, "float32"], rows["auto", place, "bfloat16"]
        ratio = narrow["seconds"] / wide["seconds"] / 2
        name = "`mpiddl.empty`" if place == "empty" else "plain"
        cells[f"{name}: bfloat16 / float32, time per element"] = f"{ratio:.2f}"
    return cells


def _network(report: dict[str, Any], rows: dict[tuple[str, str, str], Row]) -> dict[str, str]:
    """busbw, and what part of plain TCP's goodput it is."""
    goodput = report["environment"]["tcp_gbps"]
    cells = {}
    for (algorithm, place, _), row in rows.items():
        if place == "plain":
            busbw = row["busbw"]
            cells[f"{algorithm}, MB/s"] = f"{busbw * 1e3:.1f} ({busbw / goodput:.2f})"
    return cells


def _table(report: dict[str, Any]) -> str:
    if _on_gpus(report):
        return _formatted(
            [
                {"size": format_bytes(nbytes), **gpu_line(report, list(rows))}
                for nbytes, rows in groupby(report["rows"], lambda row: row["nbytes"])
            ]
        )
    cells_of = _network if "lab" in report["environment"] else _one_node
    if any(row["dtype"] != "float32" for row in report["rows"]):
        cells_of = _dtypes
    sizes = sorted({row["nbytes"] for row in report["rows"]})
    lines = []
    for nbytes in sizes:
        rows = {_key(row): row for row in report["rows"] if row["nbytes"] == nbytes}
        lines.append({"size": format_bytes(nbytes), **cells_of(report, rows)})
    return _formatted(lines)


def _on_gpus(report: dict[str, Any]) -> bool:
    return "copy_gbps" in report.get("memory", {})


def _formatted(lines: Sequence[dict[str, str]]) -> str:
    names = {name: None for line in lines for name in line}
    cells = [[line.get(name, "") for name in names] for line in lines]
    align = ["left", *["right"] * (len(names) - 1)]
    return tabulate(cells, list(names), "pipe", colalign=align, disable_numparse=True)


def _heading(report: dict[str, Any]) -> str:
    environment = report["environment"]
    first = environment["ranks"][0]
    facts = [
        f"{environment['mpi']}",
        f"{first['node_cores']} cores of {first['cpu']}",
        f"{environment['date'][:10]}, commit {environment['commit']}",
    ]
    if _on_gpus(report):
        facts += gpu_facts(report)
    elif "lab" in environment:
        facts.append(f"plain TCP {environment['tcp_gbps'] * 1e3:.1f} MB/s")
    elif "memory" in report:
        facts.append(f"memory {report['memory']['stream_gbps']:.1f} GB/s")
    return ", ".join(facts) + f": `{environment['command']}`"


def tables(runs: dict[str, str], bench: str) -> str:
    """All tables of one suite, as Markdown."""
    parts = []
    for name, title in runs.items():
        found = sorted((HERE / "results").glob(f"{bench}_*_{name}.json"), reverse=True)
        if found:
            parts.append(f"### {title}")
        for path in found:
            report = json.loads(path.read_text())
            parts.append(_heading(report))
            if bench == "overlap":
                for caption, lines in overlap_tables(report):
                    parts += [f"{caption}:", _formatted(lines)]
            else:
                parts.append(_table(report))
    return "\n\n".join(parts)


def _replaced(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between its two comments of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    page = _replaced(PAGE.read_text(), "tables", tables(RUNS, "all_reduce"))
    page = _replaced(page, "gpus", tables(GPU_RUNS, "all_reduce") or NOTHING_YET)
    PAGE.write_text(_replaced(page, "overlap", tables(OVERLAP_RUNS, "overlap")))


if __name__ == "__main__":
    main()
