"""What a job tells while it trains: a line an epoch, metrics.jsonl, TensorBoard, curves."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["COUNTS", "Records", "Row", "epoch_line", "not_finite", "values_in_words"]

Row = dict[str, float]


COUNTS = ("epoch", "step", "samples_per_second", "exposed_share")
"""What every row has, besides what was measured."""


def values_in_words(row: Row) -> list[str]:
    """What was measured, for people."""
    measured = [(name, value) for name, value in row.items() if name not in COUNTS]
    return [f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured]


def not_finite(row: Row) -> list[str]:
    """Names of what is NaN or infinite."""
    return [name for name, value in row.items() if not math.isfinite(value)]


def epoch_line(row: Row, epochs: int) -> str:
    """For people."""
    return "  ".join(
        [
            f"epoch {int(row['epoch']):3d}/{epochs}",
            *values_in_words(row),
            f"{row['samples_per_second']:7.0f} samples/s",
            f"exposed communication {row['exposed_share']:5.1%}",
        ]
    )


class Records:
    """Writes them, on rank 0.

    Args:
        out: The folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._board: Any = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries that it is made of
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(out / "tensorboard"))

    def write(self, history: Sequence[Row]) -> None:
        """One JSON object a line and epoch, all of them: a job that goes on has no epoch twice.
        What is NaN or infinite is null: JSON has no numbers for it.

        Raises:
            OSError: It cannot be written.
        """
        part = self._out / ".metrics.jsonl"
        rows = [{**row, **dict.fromkeys(not_finite(row))} for row in history]
        part.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        part.replace(self._out / "metrics.jsonl")
        if self._board is not None and history:
            for name, value in history[-1].items():
                self._board.add_scalar(name, value, int(history[-1]["step"]))
            self._board.flush()

    def draw(self, history: Sequence[Row], title: str) -> Path | None:
        """curves.png; None where matplotlib is not installed.

        Raises:
            OSError: It cannot be written.
        """
        try:
            from mpiddl.job.curves import draw_curves
        except ImportError:
            return None
        draw_curves(history, title, self._out / "curves.png")
        return self._out / "curves.png"
