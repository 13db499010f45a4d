"""Pictures of a benchmark's results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpiddl.measure.bandwidth import Row
from mpiddl.units import format_bytes

__all__ = ["plot_bandwidth"]

COLOURS = {
    "auto": "#0b6e4f",
    "shared": "#2a9d8f",
    "hierarchical": "#6a4c93",
    "ring": "#1f77b4",
    "direct": "#8ab17d",
    "doubling": "#bc6c25",
    "library": "#d62828",
    "gloo": "#f4a300",
    "reference": "#999999",
}


def plot_bandwidth(path: Path, rows: Sequence[Row], limit: float | None, title: str) -> None:
    """Draw busbw and time against size, one line for each algorithm and placement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: defaultdict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        lines[row.algorithm, row.placement, row.dtype].append(row)
    several = len({row.dtype for row in rows}) > 1
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for (algorithm, placement, dtype), line in lines.items():
        style: dict[str, Any] = {
            "color": COLOURS.get(algorithm, "#333333"),
            "linestyle": "-" if placement == "empty" else "--",
            "marker": "o" if placement == "empty" else "s",
            "markersize": 4,
            "label": f"{algorithm}, {'mpiddl.empty' if placement == 'empty' else 'plain tensor'}"
            + (f", {dtype}" if several else ""),
        }
        sizes = [row.nbytes for row in line]
        left.plot(sizes, [row.busbw for row in line], **style)
        right.plot(sizes, [row.seconds * 1e6 for row in line], **style)
    if limit is not None:
        left.axhline(limit, color="black", linewidth=1, linestyle=":", label="memory limit")
    ticks = sorted({row.nbytes for row in rows})
    for axes, name in ((left, "busbw, GB/s"), (right, "median time, us")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [format_bytes(nbytes) for nbytes in ticks], rotation=45)
        axes.set_xlabel("size")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    right.set_yscale("log")
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
