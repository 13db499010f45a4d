"""A private Slurm of two nodes on this machine, and a command on its login node.

    sudo python tools/slurm_lab -- sbatch --wait jobs/slurm/single_node.sbatch
    sudo python tools/slurm_lab -- bash                    # a shell to try sbatch and srun in
    sudo python tools/slurm_lab --install                  # only the packages; Debian or Ubuntu

Nodes and login node have their own networks, host names, System V IPC and /dev/shm, so that ranks
of different nodes can only talk over the network. They share the machine's files, cores and
memory, and believe in --cpus cores and --gpus GPUs a node, whatever there is.

The command's exit status is the lab's; 2 is also the lab's own, with a line that says why. Needs
root on Linux. Nothing is left behind, however the lab ends: all daemons and jobs are in one PID
namespace, which dies with its first process, and what they write is in a file system in memory.
/run is another one there, and TMPDIR is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks" / "lab"))

from namespaces import run_in_namespaces  # noqa: E402

TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount")
DAEMONS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun")
LIBRARIES = ("libpmix.so", "libpmi2.so.0")
"""Slurm loads them by these names; without the first, `srun --mpi=pmix` hangs."""

PACKAGES = ("slurm-wlm", "slurm-wlm-basic-plugins", "slurmctld", "slurmd", "slurm-client", "munge")
PACKAGES += ("libpmix2", "libpmix-dev", "libpmi2-0", "iproute2", "util-linux")
UPDATE = ("apt-get", "update", "-q")
INSTALL = ("apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES)
MOST_LINES = 15


class LabError(Exception):
    """What keeps this machine from being a lab, and what to do."""


def _whole(most: int) -> object:
    def check(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number up to {most}")
        return int(text)

    return check


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="slurm_lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="Debian's packages, first")
    parser.add_argument("--nodes", type=_whole(16), default=2)
    parser.add_argument("--cpus", type=_whole(256), default=2, help="that each node claims")
    parser.add_argument("--gpus", type=_whole(16), default=2, help="that each node pretends")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command and not options.install:
        parser.error("give a COMMAND after `--`, or --install")
    if not options.nodes or not options.cpus:
        parser.error("--nodes and --cpus are at least 1")
    return options


def _refuse_unsuitable_machines() -> None:
    if not sys.platform.startswith("linux"):
        raise LabError(f"needs Linux's namespaces, and this is {sys.platform}")
    if os.geteuid() != 0:
        raise LabError(
            "needs root, to make namespaces and install: sudo python tools/slurm_lab ..."
        )


def _missing() -> list[str]:
    """Programs and libraries that are not here."""
    missing = [tool for tool in (*TOOLS, *DAEMONS) if shutil.which(tool) is None]
    folders = [Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib")]
    folders += Path("/usr/lib").glob("*-linux-gnu*")
    found = [name for name in LIBRARIES if any((folder / name).exists() for folder in folders)]
    return missing + [name for name in LIBRARIES if name not in found]


def _install() -> None:
    """Install what is missing, with apt-get; quick where nothing is."""
    if not _missing():
        return
    if shutil.which("apt-get") is None:
        raise LabError(f"--install needs apt-get; install by hand: {', '.join(_missing())}")
    for command in (UPDATE, INSTALL):
        # RUNLEVEL: the packages shall start no services, the lab has its own.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        done = subprocess.run(  # noqa: S603 - constants
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-MOST_LINES:])
            raise LabError(f"`{' '.join(command)}` failed:\n{tail}")


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    try:
        _refuse_unsuitable_machines()
        if options.install:
            _install()
        if missing := _missing():
            line = f"{' '.join(UPDATE)} && {' '.join(INSTALL)}"
            raise LabError(f"{', '.join(missing)} missing; `--install` does this: {line}")
    except LabError as error:
        print(f"slurm_lab: {error}", file=sys.stderr)
        return 2
    if not options.command:
        return 0
    return run_in_namespaces([sys.executable, str(HERE / "inside.py"), json.dumps(vars(options))])


if __name__ == "__main__":
    # As a program on the PATH of an installation as root may be in neither.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    sys.exit(main(sys.argv[1:]))
