"""The run of a training program: where it is, what it has measured, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mpiddl import checkpoint
from mpiddl.checkpoint.folders import checkpoints, remove
from mpiddl.checkpoint.tensors import write_model
from mpiddl.comm.failure import LeaveTogether
from mpiddl.comm.world import World
from mpiddl.data.batches import ShardBatchSampler
from mpiddl.errors import CheckpointError, OutputError
from mpiddl.job.flags import Flags
from mpiddl.job.preemption import is_any_rank_asked
from mpiddl.job.records import Records, Row, epoch_line, values_in_words
from mpiddl.job.sums import Sums
from mpiddl.overlap.calls import barrier, broadcast_json
from mpiddl.sbatch.writing import TRY_AGAIN
from mpiddl.training import replicas

__all__ = ["Run"]

FINISHED = "finished"
"""A file that says that the checkpoints beside it are of a run that came to its end."""


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
        if flags.resume:
            self._go_on()
        else:
            self._begin()
        if world.rank == 0:
            self._records = Records(flags.out)

    # How it begins.

    def _begin(self) -> None:
        """Without checkpoints of an earlier run, which ``--resume`` would take for this one's."""
        problem = None
        if self._world.rank == 0:
            try:
                problem = self._clear()
            except OSError as error:
                problem = f"{self._folder}: {error.strerror}"
        problem = broadcast_json(problem, world=self._world)
        if problem is not None:
            raise CheckpointError(problem, on_every_rank=True)

    def _clear(self) -> str | None:
        found = checkpoints(self._folder)
        if found and not (self._flags.out / FINISHED).exists():
            return (
                f"{self._folder} has checkpoints of a run that is not finished: go on with it by "
                "--resume, choose another --out, or remove that folder"
            )
        for path in found:
            remove(path)
        (self._flags.out / FINISHED).unlink(missing_ok=True)
        return None

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
        self._on_rank_0(lambda records: records.write(self.history))
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
        """
        if self._model is not None:
            replicas.check(self._model)
        self._on_rank_0(lambda records: self._write_results(records, title))
        return self.history[-1]

    def _write_results(self, records: Records, title: str) -> None:
        out, written = self._flags.out, ["metrics.jsonl"]
        if self._model is not None:
            write_model(self._model.state_dict(), out / "model.safetensors")
            written.append("model.safetensors")
        curves = records.draw(self.history, title or out.name)
        written += [curves.name] if curves is not None else []
        (out / FINISHED).touch()
        last = values_in_words(self.history[-1])
        last += [] if self._model is None else ["replicas bitwise equal"]
        print(", ".join(last))
        print(f"wrote {out}/: {', '.join(written)}", flush=True)

    def _on_rank_0(self, write: Callable[[Records], object]) -> None:
        problem = None
        if self._records is not None:
            try:
                write(self._records)
            except OSError as error:
                problem = f"{self._flags.out} cannot be written to: {error.strerror or error}"
        problem = broadcast_json(problem, world=self._world)
        if problem is not None:
            raise OutputError(problem)
