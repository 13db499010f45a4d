"""A picture of what each rank has and how long it takes: how data are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mpiddl.data.shards.skewness import Skew

__all__ = ["Balance", "plot_report"]

EVEN, BEFORE, AFTER = "#444444", "#f4a300", "#2a6f97"
COLOURS = (
    *("#2a6f97", "#f4a300", "#2a9d8f", "#d62828", "#6a4c93", "#8ab17d", "#8ecae6", "#bc6c25"),
    *("#f28482", "#264653", "#c9ada7", "#76b900"),
)
"""Of classes. More of them nobody can tell apart in bars: they are rows of a map."""
LONGEST_NAME = 20


@dataclass(frozen=True)
class Balance:
    """What ranks had of every batch and how long they computed, before and after balancing.

    Attributes:
        shares: Of the global batch. Shape: (2, ranks), or (1, ranks) where nothing changed yet.
        seconds: Busy, of a step. Shape: as ``shares``.
    """

    shares: NDArray[numpy.float64]
    seconds: NDArray[numpy.float64]

    @property
    def slowest(self) -> list[float]:
        """Seconds of the rank that all others wait for, before and after."""
        slowest: list[float] = self.seconds.max(axis=1).tolist()
        return slowest


def plot_report(path: str | Path, skew: Skew | None = None, balance: Balance | None = None) -> None:
    """Draw samples and classes of each rank, and shares and step times before and after balancing.

    Args:
        path: PNG, PDF or SVG.
        skew: For the first two panels.
        balance: For the other two.

    Raises:
        ImportError: matplotlib is missing: pip install 'mpiddl[plots]'.
    """
    from matplotlib.figure import Figure  # not pyplot: the user's own figures stay as they are
    from matplotlib.ticker import MaxNLocator

    panels: list[Callable[[Axes], None]] = []
    if skew is not None:
        panels += [partial(_draw_samples, skew=skew), partial(_draw_classes, skew=skew)]
    if balance is not None:
        panels += [partial(_draw_shares, balance=balance), partial(_draw_times, balance=balance)]
    figure = Figure(figsize=(9, 0.4 + 2.6 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False)
    for axes, draw in zip(rows[:, 0], panels, strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("rank")
        axes.margins(x=0.02)
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_samples(axes: Axes, skew: Skew) -> None:
    samples = skew.samples
    axes.bar(range(len(samples)), samples, width=0.8, color=AFTER, label="samples")
    axes.axhline(samples.mean(), color=EVEN, linewidth=1, linestyle=":", label="even")
    axes.set_ylabel("samples")
    axes.set_title(f"{samples.sum():,} samples: {samples.min():,} to {samples.max():,} on a rank")
    _finish(axes)


def _draw_classes(axes: Axes, skew: Skew) -> None:
    rank, distance = skew.worst
    axes.set_title(f"classes: rank {rank} is furthest from the data set's mix ({distance:.3f})")
    if len(skew.classes) > len(COLOURS):
        picture = axes.imshow(
            skew.shares.T * 100, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest"
        )
        axes.set_ylabel("class, in sorted order")
        beside = axes.inset_axes((1.02, 0, 0.02, 1))
        axes.figure.colorbar(picture, cax=beside, label="% of the rank's samples")
        return
    overall = skew.counts.sum(axis=0) / skew.counts.sum()
    shares = numpy.vstack([skew.shares, overall]) * 100
    ranks = len(skew.counts)
    places = [*range(ranks), ranks + 0.1 + ranks / 40]  # a little apart, what all have together
    below = numpy.zeros(ranks + 1)
    bars = {}
    for name, share, colour in zip(skew.classes, shares.T, COLOURS, strict=False):
        bars[str(name)] = axes.bar(places, share, bottom=below, width=0.8, color=colour)
        below += share
    ticks = [round(tick) for tick in axes.get_xticks() if 0 <= tick < ranks - ranks / 40]
    axes.set_xticks([*ticks, places[-1]], [*map(str, ticks), "all"])
    axes.set_ylim(0, 100)
    axes.set_ylabel("classes, % of samples")
    _finish(axes, bars)


def _draw_shares(axes: Axes, balance: Balance) -> None:
    _draw_pairs(axes, balance.shares * 100, "share of a batch, %")
    axes.axhline(
        100 / balance.shares.shape[1], color=EVEN, linewidth=1, linestyle=":", label="even"
    )
    first, last = balance.shares[0] * 100, balance.shares[-1] * 100
    axes.set_title(
        f"shares: {first.min():.1f} to {first.max():.1f}%"
        + (f", then {last.min():.1f} to {last.max():.1f}%" if len(balance.shares) > 1 else "")
    )
    _finish(axes)


def _draw_times(axes: Axes, balance: Balance) -> None:
    _draw_pairs(axes, balance.seconds * 1e3, "busy in a step, ms")
    slowest = [seconds * 1e3 for seconds in balance.slowest]
    for height, colour in zip(slowest, (BEFORE, AFTER), strict=False):
        axes.axhline(height, color=colour, linewidth=1, linestyle=":")
    change = " ms, then ".join(f"{height:.3g}" for height in slowest)
    axes.set_title(f"step times: the slowest rank takes {change} ms")
    _finish(axes)


def _draw_pairs(axes: Axes, values: NDArray[numpy.float64], name: str) -> None:
    """Two bars for each rank, or one."""
    width = 0.8 / len(values)
    looks: Sequence[Any] = [("before", BEFORE), ("after", AFTER)]
    for number, (heights, (label, colour)) in enumerate(zip(values, looks, strict=False)):
        places = numpy.arange(len(heights)) + (number - (len(values) - 1) / 2) * width
        axes.bar(places, heights, width=width, color=colour, label=label)
    axes.set_ylabel(name)


def _finish(axes: Axes, stacked: dict[str, Any] | None = None) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    # Beside the bars, never on them; of stacked ones the top first.
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    handles, names = axes.get_legend_handles_labels()
    if stacked is not None:
        names, handles = list(stacked)[::-1], list(stacked.values())[::-1]
    short = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names]
    legend = axes.legend(handles, short, frameon=False, fontsize=9, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a class may be called $
