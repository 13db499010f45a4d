"""Losses, and everything else that was measured, against epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mpiddl.job.records import COUNTS

__all__ = ["draw_curves"]


def draw_curves(history: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Losses on the left, on a logarithmic scale where they allow it; what is better when higher
    on the right."""
    names = [name for name in history[-1] if name not in COUNTS]
    losses = [name for name in names if "loss" in name or "error" in name]
    others = [name for name in names if name not in losses]
    panels = [group for group in (losses, others) if group] or [["samples_per_second"]]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axis, group in zip(axes[0], panels, strict=True):
        _panel(axis, history, group)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Axes, history: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    for name in names:
        rows = [row for row in history if name in row]
        axis.plot(
            [row["epoch"] for row in rows],
            [row[name] for row in rows],
            "o-",
            markersize=3,
            label=name.replace("_", " "),
        )
    values = [row[name] for row in history for name in names if name in row]
    if "loss" in names[0] and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.legend()
