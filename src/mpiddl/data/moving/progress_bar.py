"""How far long work on data has come, told by rank 0: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpiddl.base.units import format_bytes
from mpiddl.comm.world import World

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress", "progress"]

PATIENCE_SECONDS = 1.0
"""Shorter work shows no bar."""
REFRESH_SECONDS = 0.1
LINE_SECONDS = 10.0
"""Between two lines, where no bar can be drawn."""


@contextmanager
def progress(total: int, what: str, world: World, unit: str = "bytes") -> Iterator[Progress]:
    """Show on rank 0's stderr how far the work inside the ``with`` has come. Not collective.

    Args:
        total: Bytes, or other units, that there are.
        what: What is done, "filling /dev/shm" for example.
        world: Its rank 0 shows something, the others nothing.
        unit: What is counted.
    """
    shown = Progress(total, what, unit, show=world.rank == 0)
    try:
        yield shown
    finally:
        shown.stop()


class Progress:
    """Work under way; see ``progress``."""

    def __init__(self, total: int, what: str, unit: str, show: bool) -> None:
        self._total = total
        self._what = what
        self._unit = unit
        self._show = show
        self._done = 0
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._draws = sys.stderr.isatty()
        self._started = time.monotonic()
        self._next = self._started + (PATIENCE_SECONDS if self._draws else LINE_SECONDS)

    def advance(self, number: int) -> None:
        """So much more is done."""
        self._done += number
        now = time.monotonic()
        if not self._show or now < self._next:
            return
        if self._draws:
            self._draw()
            self._next = now + REFRESH_SECONDS
        else:
            sys.stderr.write(self._line(now - self._started))
            sys.stderr.flush()
            self._next = now + LINE_SECONDS

    def stop(self) -> None:
        """Leave the bar as it is; the terminal is the caller's again."""
        if self._bar is not None:
            self._draw()
            self._bar.stop()
            self._bar = None

    def _draw(self) -> None:
        if self._bar is None:
            self._bar = self._start()
        assert self._task is not None
        self._bar.update(self._task, completed=self._done, refresh=True)

    def _start(self) -> Bar:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        counted: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(self._unit, markup=False)]
        if self._unit == "bytes":
            counted = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *counted,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=False,  # no thread
            redirect_stdout=False,
            redirect_stderr=False,
        )
        # What is done before the bar is there counts for the speed, too.
        self._task = bar.add_task(self._what, total=self._total, start=False)
        bar.tasks[0].start_time = bar.get_time() - (time.monotonic() - self._started)
        bar.start()
        return bar

    def _line(self, seconds: float) -> str:
        share = self._done / self._total if self._total else 1.0
        done, total = f"{self._done:,}", f"{self._total:,} {self._unit}"
        speed = f"{self._done / seconds:,.0f}"
        if self._unit == "bytes":
            done, total = format_bytes(self._done), format_bytes(self._total)
            speed = format_bytes(int(self._done / seconds))
        return f"mpiddl: {self._what}: {share:.0%}, {done} of {total}, {speed}/s\n"
