"""Pictures of a benchmark's results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpiddl.base.units import format_bytes
from mpiddl.bench import overlap
from mpiddl.bench.bandwidth import Row

__all__ = ["plot_bandwidth", "plot_overlap"]

COLOURS = {
    "auto": "#0b6e4f",
    "shared": "#2a9d8f",
    "hierarchical": "#6a4c93",
    "ring": "#1f77b4",
    "direct": "#8ab17d",
    "doubling": "#bc6c25",
    "nccl": "#76b900",
    "sendrecv": "#444444",
    "library": "#d62828",
    "gloo": "#f4a300",
    "reference": "#999999",
    "after": "#999999",
    "mpiddl/inline": "#0b6e4f",
    "mpiddl/thread": "#2a9d8f",
    "mpiddl/auto": "#8ab17d",
    "next/inline": "#1f77b4",
    "next/thread": "#6baed6",
    "next/auto": "#6a4c93",
    "ddp": "#d62828",
    "ddp/views": "#f28482",
    "horovod": "#f4a300",
}


def plot_bandwidth(path: Path, rows: Sequence[Row], limit: float | None, title: str) -> None:
    """Draw busbw and time against size, one line for each algorithm and placement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: defaultdict[tuple[str, str, str, str | None], list[Row]] = defaultdict(list)
    for row in rows:
        lines[row.algorithm, row.placement, row.dtype, row.staging].append(row)
    several = len({row.dtype for row in rows}) > 1
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for (algorithm, placement, dtype, staging), line in lines.items():
        style: dict[str, Any] = {
            "color": COLOURS.get(algorithm, "#333333"),
            "linestyle": "-" if placement == "empty" else "--",
            "marker": "x" if staging == "host" else "o" if placement == "empty" else "s",
            "markersize": 4,
            "label": f"{algorithm}, {'mpiddl.empty' if placement == 'empty' else 'plain tensor'}"
            + (f", staging {staging}" if staging else "")
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


def plot_overlap(path: Path, rows: Sequence[overlap.Row], title: str) -> None:
    """Draw exposed time, a bar for each candidate, a group for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(1.5 + 3.5 * len(models), 4.5), layout="constrained", squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        bars = [row for row in rows if row.model == model and row.candidate != overlap.BASELINE]
        names = [row.candidate for row in bars]
        heights = [row.exposed * 1e3 for row in bars]
        below = [(row.exposed - row.exposed_low) * 1e3 for row in bars]
        above = [(row.exposed_high - row.exposed) * 1e3 for row in bars]
        colours = [COLOURS.get(name, "#333333") for name in names]
        drawn = axes.bar(names, heights, color=colours, yerr=[below, above], capsize=3)
        axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
        alone = next(r for r in rows if r.model == model and r.candidate == overlap.BASELINE)
        axes.set_title(f"{model}: {alone.seconds * 1e3:.0f} ms without exchange", fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.margins(y=0.1)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("exposed time of a step, ms")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
