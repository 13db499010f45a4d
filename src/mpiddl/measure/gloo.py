"""torch.distributed's gloo in a process of its own, one beside each rank.

The rank gives orders as lines of JSON and sleeps until the answer comes; the process sleeps while
others are timed, and ends with its rank.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import torch

from mpiddl.comm.world import World
from mpiddl.errors import PeerError
from mpiddl.measure.patterns import count_wrong, fill, lengths
from mpiddl.overlap.calls import broadcast_json, gather_json

__all__ = ["Gloo"]

START_SECONDS = 60
ANSWER_SECONDS = 300


class Gloo:
    """The gloo process beside this rank. Collective: every rank makes one.

    Raises:
        PeerError: On every rank, if one of the processes could not start.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        environment = dict(os.environ)
        if world.num_nodes == 1:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mpiddl.measure.gloo"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        host = "127.0.0.1" if world.num_nodes == 1 else world.hostname
        address = broadcast_json(f"tcp://{host}:{_free_port()}" if world.rank == 0 else None)
        threads = torch.get_num_threads()
        self.order("join", address=address, rank=world.rank, size=world.size, threads=threads)

    def order(self, name: str, **arguments: Any) -> Any:
        """Let all processes do one thing; this rank's answer.

        Raises:
            PeerError: On every rank, if one of them failed.
        """
        answer = self._ask([name, arguments])
        problems = gather_json(answer.get("problem"), world=self._world)
        for rank, problem in enumerate(problems):
            if problem is not None:
                self.close()
                raise PeerError(f"gloo beside rank {rank}: {problem}")
        return answer["result"]

    def _ask(self, order: list[Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()
            if not select.select([stdout], [], [], ANSWER_SECONDS)[0]:
                return {"problem": f"no answer within {ANSWER_SECONDS} s"}
            answer: dict[str, Any] = json.loads(stdout.readline() or b"null")
        except (OSError, ValueError) as error:
            return {"problem": str(error)}
        return answer or {"problem": f"the process ended with status {self._process.wait()}"}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


class _Process:
    """What the process itself does."""

    def join(self, address: str, rank: int, size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.distributed.init_process_group(
            "gloo",
            init_method=address,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=START_SECONDS),
        )
        self.rank, self.size = rank, size

    def prepare(self, collective: str, length: int, dtype: str, op: str, check: bool) -> int:
        """Make buffers; run once and, with ``check``, count what is wrong."""
        self.collective, self.op = collective, op
        before, after = lengths(collective, length, self.size)
        self.input = torch.empty(before, dtype=getattr(torch, dtype))
        self.output = self.input
        if collective not in ("all-reduce", "broadcast"):
            self.output = torch.empty(after, dtype=self.input.dtype)
        fill(self.input, self.rank, self.size, op)
        self._run()
        wrong = count_wrong(self.output, collective, self.rank, self.size, op) if check else 0
        self.input.zero_()
        return wrong

    def time(self, calls: int) -> float:
        """Seconds per call."""
        torch.distributed.barrier()
        started = time.perf_counter()
        for _ in range(calls):
            self._run()
        return (time.perf_counter() - started) / calls

    def _run(self) -> None:
        distributed = torch.distributed
        ops = {"sum": "SUM", "min": "MIN", "max": "MAX", "prod": "PRODUCT"}
        if self.collective == "broadcast":
            distributed.broadcast(self.output, 0)
        elif self.collective == "all-gather":
            distributed.all_gather_into_tensor(self.output, self.input)
        elif self.collective == "all-to-all":
            distributed.all_to_all_single(self.output, self.input)
        elif self.op not in ops:
            raise ValueError(f"it has no {self.op}")
        elif self.collective == "reduce-scatter":
            op = getattr(distributed.ReduceOp, ops[self.op])
            distributed.reduce_scatter_tensor(self.output, self.input, op)
        else:
            distributed.all_reduce(self.output, getattr(distributed.ReduceOp, ops[self.op]))


def _serve() -> None:
    """Obey until the rank is gone."""

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what gloo prints is no answer
    process = _Process()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"result": getattr(process, name)(**arguments)}
        except Exception as error:
            answer = {"problem": str(error).partition("\n")[0]}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    _serve()
