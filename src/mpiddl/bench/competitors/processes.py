"""Libraries that are timed beside mpiddl: each in a process of its own next to every rank.

There a library cannot disturb MPI, nor MPI the library. While it is timed the rank sleeps in a
read; while others are timed its process is stopped, so that no thread of it takes cycles.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch

from mpiddl.api.objects import broadcast_json, gather_json
from mpiddl.comm.world import World
from mpiddl.doctor.environment import first_interface
from mpiddl.errors import PeerError

__all__ = ["PEERS", "Peer"]

PEERS = ("gloo", "horovod")
"""Those that do collectives; torch's DDP is trained on nccl, too."""
ANSWER_SECONDS = 300.0
GOODBYE_SECONDS = 5.0
LAST_WORDS = 300
"""Characters of a failed process's stderr that an error shows."""

# What a launcher says of the rank is not true of a process beside it.
LAUNCHERS_OWN = ("OMPI_", "PMI", "PRTE_", "HYDRA_", "HYDI_", "I_MPI_", "MPI_", "MPIR_", "MV2_")


class Peer:
    """One library's processes, one beside each rank. Every method but ``close`` is collective.

    Args:
        name: gloo, nccl or horovod.
        world: The ranks.

    Raises:
        PeerError: On every rank, if the library is missing on one, or a process failed.
    """

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._world = world
        self._over: str | None = None  # the same on every rank
        self._agree(_missing(name))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "mpiddl.bench.competitors.child", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(os.environ, world),
        )
        self._join()

    def _join(self) -> None:
        world = self._world
        address = "127.0.0.1"
        if world.num_nodes > 1:
            interface = first_interface()
            address = interface["address"] if interface else world.hostname
        hosts = gather_json([world.hostname, world.local_rank, world.local_size], world=world)
        port = self.order("host", hosts=hosts) if world.rank == 0 else self.order("nothing")
        address, port = broadcast_json([address, port], world=world)
        place = {"rank": world.rank, "size": world.size, "node_rank": world.node_rank}
        place |= {"local_rank": world.local_rank, "local_size": world.local_size}
        device, nodes = str(world.device), world.num_nodes
        self.order("join", address=address, port=port, num_nodes=nodes, device=device, **place)

    def order(self, name: str, **arguments: Any) -> Any:
        """Let all processes do something; this rank's answer.

        Raises:
            PeerError: On every rank, if one of them failed.
        """
        if self._over is not None:
            raise PeerError(self._over)
        self._process.send_signal(signal.SIGCONT)
        answer, problem = self._exchange({"name": name, "arguments": arguments})
        self._process.send_signal(signal.SIGSTOP)
        try:
            self._agree(problem)
        except PeerError as error:
            self._over = str(error)
            self.close()
            raise
        return answer

    def _agree(self, problem: tuple[bool, str] | None) -> None:
        problems = gather_json(problem, world=self._world)
        # Those that lost a peer complain of that: the cause is the one that is gone.
        failed = sorted((not gone[0], rank, gone[1]) for rank, gone in enumerate(problems) if gone)
        if failed:
            _, rank, reason = failed[0]
            raise PeerError(f"{self.name} beside rank {rank}: {reason}")

    def _exchange(self, request: dict[str, Any]) -> tuple[Any, tuple[bool, str] | None]:
        """The answer, and what went wrong: whether the process is gone, and the reason."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None, (True, self._last_words())
        line = self._read_line(time.monotonic() + ANSWER_SECONDS)
        if line is None:
            return None, (False, f"no answer within {ANSWER_SECONDS:.0f} s")
        if not line.endswith(b"\n"):
            return None, (True, self._last_words())
        reply = json.loads(line)
        return reply["result"], None if reply["problem"] is None else (False, reply["problem"])

    def _read_line(self, until: float) -> bytes | None:
        """One line; less than one if the process is gone; None if time is up."""
        assert self._process.stdout is not None
        handle, line = self._process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            if not select.select([handle], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            piece = os.read(handle, 1 << 16)
            if not piece:
                break
            line += piece
        return line

    def _last_words(self) -> str:
        """How the process ended, and what it said last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GOODBYE_SECONDS)
        status = self._process.returncode
        how = f"its process ended with status {status}"
        if status is not None and status < 0:
            how = f"its process was killed by {signal.Signals(-status).name}"
        self._errors.seek(0)
        words = " ".join(self._errors.read().decode(errors="replace").split())[-LAST_WORDS:]
        return how + (f" ({words})" if words else "")

    def close(self) -> None:
        """End the process beside this rank."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def _missing(name: str) -> tuple[bool, str] | None:
    """Why ``name`` cannot be started on this rank, as ``_agree`` wants it."""
    if name == "gloo":
        there = torch.distributed.is_available() and torch.distributed.is_gloo_available()
        return None if there else (True, "this torch was built without it")
    if name == "nccl":
        there = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        return None if there else (True, "this torch was built without it")
    there = importlib.util.find_spec(name) is not None
    return None if there else (True, "it is not installed")


def _environment(environ: Mapping[str, str], world: World) -> dict[str, str]:
    """This rank's environment without its launcher's, with as many threads and one network."""
    kept = {name: text for name, text in environ.items() if not name.startswith(LAUNCHERS_OWN)}
    kept["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    interface = first_interface()
    if interface is not None or world.num_nodes == 1:
        name = "lo" if world.num_nodes == 1 or interface is None else interface["name"]
        kept.setdefault("GLOO_SOCKET_IFNAME", name)
        kept.setdefault("NCCL_SOCKET_IFNAME", name)
    kept.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")  # it would take a stopped one for stuck
    return kept
