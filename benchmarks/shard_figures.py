"""The pictures of docs/data.md: which sample goes to which rank, for each kind of shard.

    python benchmarks/shard_figures.py

docs/figures/shard_NAME.png: samples in the order of the data set, coloured by rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy
import typer

from mpiddl.data.shards.kinds import SHARDINGS, sharding

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
LENGTH, RANKS, PER_ROW = 96, 4, 32
COLOURS = ("#2a6f97", "#f4a300", "#8ab17d", "#d1495b")
# Three classes, sorted as data sets often are; the last one rare.
LABELS = numpy.repeat(["a", "b", "c"], [56, 30, 10])
GROUPS = numpy.repeat(list("ABCDEFGHIJKLMNOP"), [9, 3, 7, 5, 8, 4, 6, 10, 2, 7, 5, 6, 9, 4, 6, 5])
OPTIONS: dict[str, dict[str, Any]] = {
    "stratified": {"labels": LABELS},
    "balanced": {"labels": LABELS},
    "grouped": {"groups": GROUPS},
    "weighted": {"weights": [1, 2, 3, 3]},
}


def draw(name: str, path: Path) -> None:
    """One sharding."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    dealt = sharding(name, LENGTH, **OPTIONS.get(name, {}))
    shards = [numpy.asarray(dealt.shard(rank, RANKS)) for rank in range(RANKS)]
    texts = {"stratified": LABELS, "balanced": LABELS, "grouped": GROUPS}.get(name)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 1.9), width_ratios=(5, 1), layout="constrained"
    )
    for index in range(LENGTH):
        row, column = divmod(index, PER_ROW)
        owners = sorted(rank for rank in range(RANKS) for _ in range((shards[rank] == index).sum()))
        left.add_patch(Rectangle((column, -row), 0.9, 0.8, color="#eeeeee"))
        for number, rank in enumerate(owners):  # drawn several times: a stripe for each
            width = 0.9 / len(owners)
            place = (column + number * width, -row)
            left.add_patch(Rectangle(place, width, 0.8, color=COLOURS[rank]))
        if texts is not None:
            ink = "white" if owners else "#999999"
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": ink}
            left.text(column + 0.45, 0.4 - row, texts[index], **style)
    left.set(xlim=(-0.2, PER_ROW), ylim=(-LENGTH / PER_ROW + 0.8, 1))
    left.set_axis_off()
    left.set_title(f"{name}: samples 0 to {LENGTH - 1} in the order of the data set", fontsize=9)
    bars = right.barh(range(RANKS), [len(shard) for shard in shards], color=COLOURS)
    right.bar_label(bars, fontsize=8, padding=2)
    right.set_yticks(range(RANKS), [f"rank {rank}" for rank in range(RANKS)], fontsize=8)
    right.set_title("samples", fontsize=9)
    right.invert_yaxis()
    right.margins(x=0.2)
    right.xaxis.set_visible(False)
    right.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Draw them all."""
    matplotlib.use("Agg")
    for name in SHARDINGS:
        draw(name, FIGURES / f"shard_{name}.png")


if __name__ == "__main__":
    typer.run(main)
