"""The lab's first process, in namespaces of its own. When it ends, all of the lab is gone.

Hosts are namespaces, as in benchmarks/lab: host1, host2, ... with a slurmd each are the nodes, and
the last one is the login node, where slurmctld and the command run. One munged serves all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from configuration import FOLDER, LOGS, MUNGE_KEY, MUNGE_SOCKET, SLURM_CONF, write_configuration

NETWORK = Path(__file__).parents[2] / "benchmarks" / "lab"
sys.path.insert(0, str(NETWORK))

from network import Host, Links, NetworkError, make_hosts  # noqa: E402

LINKS = Links(rate="10gbit", delay="0ms", loss=0.0)
START_SECONDS = 60.0
POLL_SECONDS = 0.05
MOST_LINES = 15
RUN = Path("/run")
TMPDIR = RUN / "tmp"


class StartError(Exception):
    """A daemon did not come up."""


class _Daemons:
    """Those that were started; what each says goes to its log."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        with (LOGS / f"{name}.log").open("w") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603 - Slurm's
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Raises StartError if a daemon ends, or if it takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            ended = [name for name, process in self._processes.items() if process.poll()]
            if ended or time.monotonic() > deadline:
                raise StartError(_ends(f"{what} did not come up", ended or self._processes))
            time.sleep(POLL_SECONDS)


def _ends(what: str, names: Iterable[str]) -> str:
    """``what``, and the end of these logs."""
    lines = [what]
    for name in names:
        tail = (LOGS / f"{name}.log").read_text(errors="replace").splitlines()[-MOST_LINES:]
        lines += [f"{name}: {line}" for line in tail]
    return "\n".join(lines)


def _call(*command: str) -> None:
    subprocess.run(command, check=True)  # noqa: S603 - constants


def _start_munge(daemons: _Daemons) -> None:
    _call("mungekey", "--create", "--keyfile", str(MUNGE_KEY))
    files = {"key-file": MUNGE_KEY, "socket": MUNGE_SOCKET}
    files |= {f"{kind}-file": FOLDER / f"munge.{kind}" for kind in ("pid", "log", "seed")}
    flags = [f"--{name}={path}" for name, path in files.items()]
    daemons.start("munged", ["munged", "--foreground", "--force", *flags], dict(os.environ))
    daemons.wait_until(MUNGE_SOCKET.exists, "munged")


def _start_slurm(
    nodes: Sequence[Host], login: Host, environment: dict[str, str], daemons: _Daemons
) -> None:
    daemons.start("slurmctld", login.command("slurmctld", "-D", "-i"), environment)
    for node in nodes:
        start = node.command("slurmd", "-D", "-N", node.name)
        daemons.start(f"slurmd-{node.name}", start, environment)
    query = login.command("sinfo", "--noheader", "--Node", "--format=%T", "--partition=main")

    def are_idle() -> bool:
        asked = subprocess.run(  # noqa: S603 - Slurm's
            query, env=environment, capture_output=True, text=True, check=False
        )
        return asked.stdout.split() == ["idle"] * len(nodes)

    daemons.wait_until(are_idle, "the nodes")


def _environment(hosts: Sequence[Host]) -> dict[str, str]:
    """The user's, without what a Slurm around the lab may have set."""
    outer = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SCANCEL")
    users = {name: text for name, text in os.environ.items() if not name.startswith(outer)}
    return users | {
        "SLURM_CONF": str(SLURM_CONF),
        "SLURM_LAB_LOGS": str(LOGS),
        "TMPDIR": str(TMPDIR),  # seen by all nodes, gone with the lab
        # benchmarks/lab/agent.py, which stands in for ssh, finds hosts in this table.
        "LAB_HOSTS": json.dumps({host.name: host.process for host in hosts}),
    }


def _run(plan: dict[str, Any]) -> int:
    _call("mount", "-t", "tmpfs", "slurm_lab", str(RUN))
    for folder in (FOLDER, LOGS, TMPDIR):
        folder.mkdir(mode=0o755, parents=True)
    TMPDIR.chmod(0o1777)
    hosts = make_hosts(plan["nodes"] + 1, LINKS)
    *nodes, login = hosts
    write_configuration(nodes, login, plan["cpus"], plan["gpus"])
    environment = _environment(hosts)
    daemons = _Daemons()
    _start_munge(daemons)
    _start_slurm(nodes, login, environment, daemons)
    return _run_to_its_end(login.command(*plan["command"]), environment)


def _run_to_its_end(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run it, and take leave of all orphans meanwhile: they are the first process's children."""
    process = subprocess.Popen(command, env=environment)  # noqa: S603 - the user's
    while True:
        ended, status = os.wait()
        if ended == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode


def main() -> int:
    plan = json.loads(sys.argv[1])
    try:
        status = _run(plan)
    except (NetworkError, StartError, OSError, subprocess.CalledProcessError) as error:
        print(f"slurm_lab: {error}", file=sys.stderr)
        return 2
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
