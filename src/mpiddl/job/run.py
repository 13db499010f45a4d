"""The run of a training program: where it is, what it has measured, and its checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mpiddl import checkpoint
from mpiddl.api.barrier import barrier
from mpiddl.api.fail_together import Tick, work_together
from mpiddl.base.log import logger
from mpiddl.checkpoint.folders import checkpoints, remove
from mpiddl.checkpoint.model_file import check_model, write_model
from mpiddl.comm.world import World
from mpiddl.data.shards.batches import ShardBatchSampler
from mpiddl.errors import CheckpointError, OutputError
from mpiddl.job.flags import Flags
from mpiddl.job.preemption import is_any_rank_asked
from mpiddl.job.records import Records, Row, epoch_line, not_finite, values_in_words
from mpiddl.job.sums import Sums
from mpiddl.launch.exit import LeaveTogether
from mpiddl.sbatch.writing import TRY_AGAIN
from mpiddl.training import replicas

__all__ = ["Run"]

FINISHED = "finished"
"""A file that says that the checkpoints beside it are of a run that came to its end."""

FAILED = 1
"""Exit status of a run that came to its end with nothing that is worth having."""


class Run:
    """One training, from its first start to its end, however often it is stopped between.

    With ``--resume`` it begins where the last checkpoint was saved, in mid-epoch if need be.
    Checkpoints hold the parts, the random generators, and how far the run is. Collective.

    Args:
        flags: What the user typed.
        world: The ranks.
        model: That is trained; ``finish`` checks that replicas are equal and writes it.
        optimizer: Part of checkpoints.
        batches: What deals samples out; ``epochs`` tells it the epoch, and it goes on in mid-epoch.
            Without it an epoch that was begun is begun again: have one step in each, and leave
            out the one that ``steps`` has counted already.
        parts: More that checkpoints hold: whatever has ``state_dict()`` and ``load_state_dict()``.

    Attributes:
        history: What was measured in each epoch so far.
        steps: Steps so far.
    """

    def __init__(
        self,
        flags: Flags,
        world: World,
        *,
        model: Any = None,
        optimizer: Any = None,
        batches: ShardBatchSampler | None = None,
        **parts: Any,
    ) -> None:
        self._flags = flags
        self._world = world
        self._model = model
        self._batches = batches
        given = {"model": model, "optimizer": optimizer, **parts}
        self._parts = {name: part for name, part in given.items() if part is not None}
        self._folder = flags.out / "checkpoints"
        self._records: Records | None = None
        self.history: list[Row] = []
        self.steps = 0
        self._epoch, self._of_loop = 1, 0
        self._sums = Sums(world, model)
        if model is not None:
            check_model(model.state_dict())  # now, and not when it is trained
        if flags.resume:
            self._go_on()
        else:
            self._begin()
        if world.rank == 0:
            self._records = Records(flags.out)

    # How it begins.

    def _begin(self) -> None:
        """Without checkpoints of an earlier run, which ``--resume`` would take for this one's."""
        work_together(self._clear, self._world, CheckpointError)

    def _clear(self, tick: Tick) -> None:
        if self._world.rank != 0:
            return
        finished = self._flags.out / FINISHED
        found = checkpoints(self._folder)
        if found and not self._flags.overwrite:
            which = "a run" if finished.exists() else "a run that is not finished"
            raise CheckpointError(
                f"{self._folder} has checkpoints of {which}: go on with it by --resume, choose "
                "another --out, or begin anew by --overwrite, which removes them"
            )
        try:
            for path in found:
                remove(path)
                tick()
            finished.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._folder}: {error.strerror}") from None

    def _go_on(self) -> None:
        batches = {} if self._batches is None else {"batches": self._batches}
        found = checkpoint.load(
            self._folder, world=self._world, progress=None, **self._parts, **batches
        )
        if self._world.rank == 0:
            (self._flags.out / FINISHED).unlink(missing_ok=True)
        if found is None:
            return
        progress = found.values["progress"]
        self.history, self.steps = progress["history"], found.step
        self._epoch = progress["epoch"]
        self._sums.restore(progress["sums"])
        if self._world.rank == 0:
            print(f"goes on after step {self.steps}, in epoch {self._epoch}: {found.path}")

    # How it goes on.

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, counted from 1. ``epoch_ends`` is due in each."""
        while self._epoch <= self._flags.epochs:
            epoch = self._epoch
            if self._batches is not None:
                self._batches.set_epoch(epoch)
            self._of_loop = 0
            self._sums.begin()
            yield epoch
            if self._epoch == epoch:
                raise RuntimeError("call run.epoch_ends() at the end of each epoch")

    def step(self, samples: int, **means: torch.Tensor | float) -> None:
        """A step is over: count it, and save a checkpoint if one is due. Collective.

        Args:
            samples: Of this rank in it.
            means: What was measured, as means over these samples.

        Raises:
            LeaveTogether: After SIGUSR1, once a checkpoint is saved: with status 75, on every rank.
        """
        self._sums.add(samples, means)
        self.steps += 1
        self._of_loop += 1
        asked = is_any_rank_asked(self._world)
        every = self._flags.checkpoint_every
        if asked or (every and self.steps % every == 0):
            self.save()
        if asked:
            self._leave()

    def epoch_ends(self, **values: float) -> Row:
        """Tell what was measured in this epoch. Collective.

        Args:
            values: More than what ``step`` was told; the same on every rank.

        Returns:
            What is written to metrics.jsonl.
        """
        told = {name: float(value) for name, value in values.items()}
        row = {"epoch": self._epoch, "step": self.steps, **self._sums.end(), **told}
        self.history.append(row)
        if self._world.rank == 0:
            print(epoch_line(row, self._flags.epochs), flush=True)
            for name in not_finite(row):
                logger.warning("%s of epoch %d is %s, null in files", name, self._epoch, row[name])
        self._on_rank_0(lambda records, _: records.write(self.history))
        self._epoch += 1
        if self._batches is not None:
            self._batches.set_epoch(self._epoch)
        self._of_loop = 0
        if not self._flags.checkpoint_every or self._epoch > self._flags.epochs:
            self.save()
        return row

    def save(self) -> Path:
        """Write a checkpoint of this moment. Collective."""
        progress = {"epoch": self._epoch, "history": self.history, "sums": self._sums.so_far()}
        batches = {}
        if self._batches is not None:
            batches["batches"] = self._batches.state_dict(self._of_loop)
        path: Path = checkpoint.save(
            self._folder,
            self.steps,
            keep=self._flags.keep,
            world=self._world,
            progress=progress,
            **self._parts,
            **batches,
        )
        return path

    def _leave(self) -> None:
        if self._world.rank == 0:
            print(
                f"SIGUSR1: saved after step {self.steps}, leaves with status {TRY_AGAIN}; "
                "go on with --resume",
                flush=True,
            )
        barrier(world=self._world)
        raise LeaveTogether(TRY_AGAIN)

    # How it ends.

    def finish(self, title: str = "") -> Row:
        """Check that replicas are equal; write model.safetensors and curves.png. Collective.

        Returns:
            What was measured in the last epoch.

        Raises:
            SystemExit: With status 1, on every rank, once all is written: what was measured in some
                epoch is NaN or infinite.
        """
        if self._model is not None:
            replicas.check(self._model)
        self._on_rank_0(lambda records, tick: self._write_results(records, title, tick))
        failed = {name: int(row["epoch"]) for row in self.history[::-1] for name in not_finite(row)}
        if failed:
            if self._world.rank == 0:
                since = ", ".join(f"{name} since epoch {epoch}" for name, epoch in failed.items())
                print(f"error: NaN or infinite: {since}", file=sys.stderr, flush=True)
            barrier(world=self._world)
            raise SystemExit(FAILED)  # all ranks leave: there is no job to end
        return self.history[-1]

    def _write_results(self, records: Records, title: str, tick: Tick) -> None:
        out, written = self._flags.out, ["metrics.jsonl"]
        if self._model is not None:
            write_model(self._model.state_dict(), out / "model.safetensors", tick)
            written.append("model.safetensors")
        curves = records.draw(self.history, title or out.name)
        written += [curves.name] if curves is not None else []
        (out / FINISHED).touch()
        last = values_in_words(self.history[-1])
        last += [] if self._model is None else ["replicas bitwise equal"]
        print(", ".join(last))
        print(f"wrote {out}/: {', '.join(written)}", flush=True)

    def _on_rank_0(self, write: Callable[[Records, Tick], object]) -> None:
        def work(tick: Tick) -> None:
            if self._records is not None:
                write(self._records, tick)

        try:
            work_together(work, self._world, CheckpointError)
        except CheckpointError as error:
            raise OutputError(f"{self._flags.out} cannot be written to: {error}") from error
