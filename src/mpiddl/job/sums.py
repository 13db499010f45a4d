"""What is measured in an epoch, over all steps and ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from mpiddl.api.objects import gather_json
from mpiddl.comm.world import World

__all__ = ["Sums"]


class Sums:
    """Means over samples, true counts, and time.

    Args:
        world: The ranks.
        model: Tells how much time its exchange took; None: nothing does.
    """

    def __init__(self, world: World, model: Any = None) -> None:
        self._world = world
        self._model = model
        self._goes_on = False
        self._forget()

    def _forget(self) -> None:
        self._samples = 0
        self._means: dict[str, torch.Tensor | float] = {}
        self._seconds = self._exposed = 0.0  # before this process began to count
        self._began, self._exposed_before = time.perf_counter(), self._exposed_now()

    def _exposed_now(self) -> float:
        return self._model.stats().exposed_seconds if hasattr(self._model, "stats") else 0.0

    def begin(self) -> None:
        """An epoch begins, or goes on after a checkpoint was loaded."""
        if not self._goes_on:
            self._forget()
        self._goes_on = False
        self._began, self._exposed_before = time.perf_counter(), self._exposed_now()

    def add(self, samples: int, means: Mapping[str, torch.Tensor | float]) -> None:
        """A step. Tensors are added up where they are: nothing waits for a GPU."""
        self._samples += samples
        for name, mean in means.items():
            value = mean.detach().double() if isinstance(mean, torch.Tensor) else float(mean)
            if samples:  # else it is a mean of nothing
                self._means[name] = self._means.get(name, 0.0) + value * samples
            else:
                self._means.setdefault(name, 0.0)

    def so_far(self) -> dict[str, Any]:
        """Of all ranks together, for ``restore``. Collective."""
        mine = [self._samples, {name: float(value) for name, value in self._means.items()}]
        everyones = gather_json([*mine, *self._times()], world=self._world)
        names = [name for _, means, *_ in everyones for name in means]
        return {
            "samples": sum(samples for samples, *_ in everyones),
            "means": {
                name: sum(means.get(name, 0.0) for _, means, *_ in everyones) for name in names
            },
            "seconds": max(seconds for *_, seconds, _ in everyones),
            "exposed": sum(exposed for *_, exposed in everyones) / len(everyones),
        }

    def _times(self) -> tuple[float, float]:
        seconds = self._seconds + time.perf_counter() - self._began
        return seconds, self._exposed + self._exposed_now() - self._exposed_before

    def restore(self, found: Mapping[str, Any]) -> None:
        """What all ranks had seen before a stop; rank 0 keeps it from now on."""
        self._forget()
        self._goes_on = True
        self._seconds, self._exposed = found["seconds"], found["exposed"]
        if self._world.rank == 0:
            self._samples, self._means = found["samples"], dict(found["means"])

    def end(self) -> dict[str, float]:
        """Means of the epoch over all ranks. Collective."""
        found = self.so_far()
        samples = max(1, found["samples"])
        row = {name: value / samples for name, value in found["means"].items()}
        row["samples_per_second"] = found["samples"] / max(found["seconds"], 1e-9)
        row["exposed_share"] = found["exposed"] / max(found["seconds"], 1e-9)
        self._forget()
        return row
