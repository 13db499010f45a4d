"""The lab's first process, in namespaces of its own. When it ends, all of the lab is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from network import TMPDIR, Host, Links, NetworkError, make_hosts

HERE = Path(__file__).parent
MPIRUN = HERE.parents[1] / "tools" / "mpirun"
AGENT = str(HERE / "agent.py")


def _launch(plan: dict[str, Any], hosts: list[Host]) -> int:
    """Run the command on all hosts, as from a shell on the first one."""
    # The agent, which the launcher starts with a host's name, finds the host in this table.
    table = {host.name: host.process for host in hosts}
    environment = {
        **os.environ,
        "LAB_HOSTS": json.dumps(table),
        "MPI": plan["mpi"],
        # For the launchers' own files: process numbers start from 1 in every lab, so in /tmp two
        # labs would take each other's, and killed launchers would leave theirs behind.
        "TMPDIR": str(TMPDIR),
    }
    arguments = _open_mpi(plan, hosts) if plan["mpi"] == "openmpi" else _hydra(plan, hosts)
    command = hosts[0].command(str(MPIRUN), *arguments, *plan["command"])
    return subprocess.run(command, env=environment, check=False).returncode


def _open_mpi(plan: dict[str, Any], hosts: list[Host]) -> list[str]:
    ranks = plan["ranks_per_host"]
    settings = ["--prtemca", "plm_ssh_agent", AGENT, "--prtemca", "plm_ssh_no_tree_spawn", "1"]
    places = ",".join(f"{host.name}:{ranks}" for host in hosts)
    order = "node" if plan["placement"] == "cyclic" else f"ppr:{ranks}:node"
    return [*settings, "--host", places, "--map-by", order, "-n", str(ranks * len(hosts))]


def _hydra(plan: dict[str, Any], hosts: list[Host]) -> list[str]:
    ranks = plan["ranks_per_host"]
    in_a_row = 1 if plan["placement"] == "cyclic" else ranks
    places = ["-hosts", ",".join(host.name for host in hosts), "-ppn", str(in_a_row)]
    return ["-launcher", "ssh", "-launcher-exec", AGENT, *places, "-n", str(ranks * len(hosts))]


def _measure_tcp(plan: dict[str, Any], hosts: list[Host]) -> int:
    script = [sys.executable, str(HERE / "plain_tcp.py"), hosts[0].address, str(plan["seconds"])]
    listener = subprocess.Popen(hosts[0].command(*script, "listen"), stdout=subprocess.PIPE)
    caller = subprocess.Popen(hosts[1].command(*script, "call"), stdout=subprocess.PIPE)
    outputs = [process.communicate()[0] for process in (listener, caller)]
    if listener.returncode or caller.returncode:
        return 1
    received = [json.loads(output) for output in outputs]
    report = {
        "rate": plan["links"]["rate"],
        "seconds": plan["seconds"],
        "mb_per_second": {"host2_to_host1": received[0], "host1_to_host2": received[1]},
    }
    print(json.dumps(report))
    return 0


def main() -> int:
    plan = json.loads(sys.argv[1])
    try:
        hosts = make_hosts(plan["hosts"], Links(**plan["links"]))
    except NetworkError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    return _measure_tcp(plan, hosts) if plan["tcp"] else _launch(plan, hosts)


if __name__ == "__main__":
    sys.exit(main())
