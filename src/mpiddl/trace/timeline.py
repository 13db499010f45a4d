"""A picture of a few steps: what each rank computed, what flew meanwhile, what was waited for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpiddl.base.units import format_bytes, format_seconds
from mpiddl.errors import RecordingError
from mpiddl.trace.spans import Span, Step, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["choose_steps", "plot_timeline"]

COLOURS = {
    "forward": "#8ecae6",
    "start": "#d5dde3",
    "backward": "#2a6f97",
    "wait": "#d62828",
    "in flight": "#f4a300",
}
LABELS = {
    "forward": "forward",
    "start": "loss, until the first gradient",
    "backward": "backward",
    "wait": "exposed: waits for others",
    "in flight": "bucket in flight",
}
MOST_LANES = 12
"""Rows of buckets beneath a rank; with more buckets several share a row."""


def choose_steps(spans: Sequence[Span], wanted: Sequence[int] = ()) -> list[Step]:
    """The steps with these numbers on every rank; by default the one of typical length.

    The first quarter is left out of the choice: there caches and buffers are cold.

    Raises:
        RecordingError: There is no such step, or none at all.
    """
    steps = steps_of(spans)
    if not steps:
        raise RecordingError("the trace holds no whole step: no backward of a DataParallel model")
    model = max({step.model for step in steps}, key=lambda number: _bytes_of(steps, number))
    steps = [step for step in steps if step.model == model]
    numbers = sorted({step.number for step in steps})
    if not wanted:
        warm = numbers[len(numbers) // 4 :]
        lengths = {number: _length(steps, number) for number in warm}
        typical = statistics.median_low(lengths.values())
        wanted = [next(number for number in warm if lengths[number] == typical)]
    missing = next((number for number in wanted if number not in numbers), None)
    if missing is not None:
        raise RecordingError(f"the trace has no step {missing}; it has {_ranges(numbers)}")
    return [step for step in steps if step.number in wanted]


def _bytes_of(steps: Sequence[Step], model: int) -> int:
    return sum(span.nbytes for step in steps if step.model == model for span in step.buckets)


def _length(steps: Sequence[Step], number: int) -> int:
    return max(step.end - step.begin for step in steps if step.number == number)


def _ranges(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def plot_timeline(path: Path, steps: Sequence[Step]) -> None:
    """Draw ``steps``: per rank what the main thread did, and beneath it the buckets in flight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ranks = sorted({step.rank for step in steps})
    start = min(step.begin for step in steps)
    lanes = min(MOST_LANES, max(len({span.bucket for span in step.buckets}) for step in steps))
    height = 1.2 + len(ranks) * (0.7 + 0.16 * lanes)
    figure, rows = pyplot.subplots(
        len(ranks), 1, figsize=(12, height), sharex=True, squeeze=False, layout="constrained"
    )
    for rank, axes in zip(ranks, rows[:, 0], strict=True):
        mine = [step for step in steps if step.rank == rank]
        _draw_rank(axes, mine, start, lanes)
        axes.set_ylabel(f"rank {rank}", rotation=0, ha="right", va="center", fontsize=11)
    rows[-1, 0].set_xlabel("ms")
    patches = [Patch(color=COLOURS[name], label=label) for name, label in LABELS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.suptitle(_title(steps), fontsize=12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_rank(axes: Axes, steps: Sequence[Step], start: int, lanes: int) -> None:
    # Waits happen inside backward, or inside the next forward: drawn last, they lie on top.
    main = [span for step in steps for span in step.main]
    for span in sorted(main, key=lambda span: span.name == "wait"):
        _bar(axes, span, start, (0, 1.6))
    for step in steps:
        _bar(axes, _before_the_first_gradient(step), start, (0, 1.6))
        for span in step.buckets:
            lane = (span.bucket or 0) % lanes
            _bar(axes, span, start, (-0.75 * (lane + 1), 0.6))
        edge = (step.computed - start) / 1e6
        axes.axvline(edge, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(-0.75 * lanes - 0.3, 1.9)
    axes.set_yticks([])
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _before_the_first_gradient(step: Step) -> Span:
    """The loss and the start of backward, of which no event tells."""
    begin = next(span.begin for span in step.main if span.name == "backward")
    forwards = [span.end for span in step.main if span.name == "forward" and span.end < begin]
    return Span("start", step.rank, max(forwards, default=begin), begin)


def _bar(axes: Axes, span: Span, start: int, place: tuple[float, float]) -> None:
    begin, lasts = (span.begin - start) / 1e6, (span.end - span.begin) / 1e6
    axes.broken_barh([(begin, lasts)], place, facecolors=COLOURS[span.name], linewidth=0)


def _title(steps: Sequence[Step]) -> str:
    numbers = sorted({step.number for step in steps})
    which = f"step {numbers[0]}" if len(numbers) == 1 else f"steps {_ranges(numbers)}"
    lasted = statistics.mean(step.end - step.begin for step in steps) / 1e9
    exposed = statistics.mean(step.exposed_seconds for step in steps)
    hidden = statistics.mean(step.hidden_share for step in steps)
    nbytes = sum(span.nbytes for span in steps[0].buckets)
    return (
        f"{which}: {format_seconds(lasted)}, of which {format_seconds(exposed)} exposed "
        f"in waits ({exposed / lasted:.1%}); {hidden:.0%} of {format_bytes(nbytes)} flew before "
        "backward had computed its last gradient"
    )
