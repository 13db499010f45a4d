"""The process that runs another library beside a rank: ``python -m ... gloo``.

Reads one JSON object a line, does what it says, writes one. Knows nothing of MPI, sleeps in a read
when there is nothing to do, and ends with its rank.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import signal
import sys
from typing import Any, BinaryIO, Protocol

import torch

from mpiddl.bench.models import ModelSpec
from mpiddl.bench.patterns import count_wrong, fill, lengths
from mpiddl.bench.steps import Cost, Training, Way
from mpiddl.bench.timing import nothing, seconds_of

__all__ = ["Library", "main"]

PR_SET_PDEATHSIG = 1


class Library(Protocol):
    """One library's way to do the collectives, and to train."""

    def host(self, hosts: list[Any]) -> int:
        """On rank 0: let the others find each other here; the port."""

    def join(self, place: dict[str, Any]) -> None:
        """Meet the other processes."""

    def barrier(self) -> None:
        """Return once all processes are here."""

    def run(self, collective: str, source: torch.Tensor, target: torch.Tensor, op: str) -> None:
        """Do the collective; ``source`` is ``target`` where it works in place.

        Raises:
            ValueError: The library cannot do it.
        """

    def parallel(self, model: torch.nn.Module, **options: Any) -> Way:
        """The library's way to train a model."""


class _Orders:
    """What the rank may ask for."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._trainings: dict[str, Training] = {}

    def nothing(self) -> None:
        pass

    def host(self, hosts: list[Any]) -> int:
        return self._library.host(hosts)

    def join(self, **place: Any) -> None:
        self.rank, self.size = place["rank"], place["size"]
        if torch.device(place["device"]).type == "cuda":
            torch.cuda.set_device(place["device"])
        self._library.join(place)
        self._library.barrier()

    def prepare(
        self, collective: str, length: int, dtype: str, op: str, check: bool, device: str
    ) -> int | None:
        """Make buffers on ``device``; run once and, with ``check``, count what is wrong."""
        before, after = lengths(collective, length, self.size)
        source = target = torch.empty(before, dtype=getattr(torch, dtype), device=device)
        if collective not in ("all-reduce", "broadcast"):
            target = torch.empty(after, dtype=source.dtype, device=device)
        self.call = collective, source, target, op
        fill(source, self.rank, self.size, op)
        self._library.run(*self.call)
        wrong = count_wrong(target, collective, self.rank, self.size, op) if check else None
        source.zero_()
        return wrong

    def time(self, calls: int, fresh: bool) -> float:
        """Seconds per call."""
        call, source = functools.partial(self._library.run, *self.call), self.call[1]
        settle = nothing if source.is_cpu else torch.cuda.current_stream().synchronize
        return seconds_of(call, calls, self._library.barrier, source if fresh else None, settle)

    def train(
        self, training: str, spec: dict[str, Any], options: dict[str, Any], device: str
    ) -> None:
        """Make a model ready on ``device``; ``training`` is what it is called from now on."""
        self._trainings.pop(training, None)  # its memory first
        make_way = functools.partial(self._library.parallel, **options)
        self._trainings[training] = Training(
            ModelSpec(**spec), self.rank, make_way, self._library.barrier, device
        )

    def run(self, training: str, steps: int) -> Cost:
        """Train; what a step costs."""
        return self._trainings[training].run(steps)

    def changes(self, training: str) -> list[float]:
        """What training has changed."""
        return self._trainings[training].changes()


def _serve(library: Library, requests: BinaryIO, answers: BinaryIO) -> None:
    orders = _Orders(library)
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any] = {"result": None, "problem": None}
        try:
            answer["result"] = getattr(orders, request["name"])(**request["arguments"])
        except Exception as error:  # whatever a library raises is the rank's to report
            answer["problem"] = str(error).partition("\n")[0] or type(error).__name__
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main(name: str) -> None:
    """Be the process of library ``name``."""
    # A stopped process would not notice that its input has ended.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module = importlib.import_module(f"mpiddl.bench.competitors.{name}")
    _serve(module.connect(), sys.stdin.buffer, answers)
    os._exit(0)  # others may be gone: a library's own farewell could wait for them


if __name__ == "__main__":
    main(sys.argv[1])
