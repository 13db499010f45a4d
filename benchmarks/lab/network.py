"""Hosts: namespaces joined by a bridge. Links: a token bucket at each end.

           host1                 the lab                  host2
    10.77.0.1 eth0 --- port1 [ bridge switch ] port2 --- eth0 10.77.0.2

What a host sends is shaped at its eth0, what it receives at its port of the bridge. A lost packet
is one that a host has sent and that was led into a hole: a bridge with nothing behind it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TMPDIR", "Host", "Links", "NetworkError", "make_hosts"]

NETWORK = "10.77.0"
LEAST_BURST = 128 << 10
BURST_SECONDS = 1e-3
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

# Of the lab's own, then of each host's own: nothing in it outlives them.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
TMPDIR = SHARED_MEMORY / "tmp"

# Says when it is done, and keeps the namespaces alive. The lab's end kills it.
HOLD = f"""
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs lab {SHARED_MEMORY} || exit
mkdir {TMPDIR} && echo ready
exec sleep infinity
"""


class NetworkError(Exception):
    """A command of the set-up failed."""


@dataclass(frozen=True)
class Links:
    """All links of a lab, both directions: ``rate`` as tc writes it, ``loss`` in percent."""

    rate: str
    delay: str
    loss: float

    @property
    def burst(self) -> int:
        """Bytes that may go out at once: what the line sends between two ticks of the kernel."""
        bits = float(self.rate[:-4]) * UNITS[self.rate[-4:]]
        return max(LEAST_BURST, int(bits / 8 * BURST_SECONDS))

    @property
    def delays(self) -> bool:
        """Whether ``delay`` is more than nothing."""
        return float(self.delay.rstrip("mus")) > 0


@dataclass(frozen=True)
class Host:
    """A host of the lab; ``process`` holds its namespaces."""

    name: str
    address: str
    process: int

    def command(self, *arguments: str) -> list[str]:
        """``arguments`` as a command that runs on this host."""
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--wd"]
        return ["nsenter", "--target", str(self.process), *namespaces, "--", *arguments]


def make_hosts(number: int, links: Links) -> list[Host]:
    """``number`` hosts (1 to 254) on one bridge.

    The caller must be in network and mount namespaces of its own.
    """
    names = {f"{NETWORK}.{index}": f"host{index}" for index in range(1, number + 1)}
    _run("mount", "-t", "tmpfs", "lab", str(SHARED_MEMORY))
    table = SHARED_MEMORY / "hosts"
    lines = [f"{address} {name}\n" for address, name in names.items()]
    table.write_text("127.0.0.1 localhost\n" + "".join(lines))
    _run("ip", "link", "set", "lo", "up")
    for bridge in ("switch", "hole"):
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
    hosts = []
    for address, name in names.items():
        hosts.append(Host(name, address, _hold(name, table)))
        _connect(hosts[-1], f"port{len(hosts)}", links)
    return hosts


def _hold(name: str, table: Path) -> int:
    """Number of a process that holds a new host's namespaces."""
    namespaces = ["unshare", "--net", "--uts", "--ipc", "--mount"]
    holder = subprocess.Popen(
        [*namespaces, "sh", "-c", HOLD, "hold", name, str(table)],
        stdout=subprocess.PIPE,
        text=True,
    )
    if not holder.stdout or holder.stdout.readline() != "ready\n":
        raise NetworkError("namespaces are not permitted here")
    return holder.pid


def _connect(host: Host, port: str, links: Links) -> None:
    peer = ["peer", "name", "eth0", "netns", str(host.process)]
    _run("ip", "link", "add", port, "type", "veth", *peer)
    _run("ip", "link", "set", port, "master", "switch", "up")
    _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", "eth0"))
    _run(*host.command("ip", "link", "set", "lo", "up"))
    _run(*host.command("ip", "link", "set", "eth0", "up"))
    _shape([], port, links)
    _shape(host.command(), "eth0", links)
    if links.delays:
        _delay(host.command(), "eth0", links)
    if links.loss:
        _run(
            *host.command("ip", "link", "set", "eth0", "gso_max_segs", "1")
        )  # packets, not bundles
        _lose(port, links.loss)


def _shape(where: Sequence[str], device: str, links: Links) -> None:
    bucket = ["rate", links.rate, "burst", str(links.burst), "latency", "100ms"]
    _run(*where, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", "tbf", *bucket)


def _delay(where: Sequence[str], device: str, links: Links) -> None:
    # What waits out a long delay must fit, or the queue loses packets that nobody asked it to.
    delay = ["netem", "delay", links.delay, "limit", "100000"]
    try:
        _run(*where, "tc", "qdisc", "add", "dev", device, "parent", "1:1", *delay)
    except NetworkError as error:
        raise NetworkError(f"--delay needs the kernel's sch_netem: {error}") from error


def _lose(port: str, percent: float) -> None:
    """Lose packets that come in at ``port``, with netem or without."""
    # Classic BPF: load a random number; below the threshold the packet matches.
    threshold = int(percent / 100 * 2**32)
    program = f"4,32 0 0 4294963256,53 0 1 {threshold},6 0 0 0,6 0 0 4294967295"
    into_the_hole = ["action", "mirred", "egress", "redirect", "dev", "hole"]
    _run("tc", "qdisc", "add", "dev", port, "ingress")
    at = ["dev", port, "parent", "ffff:", "protocol", "all"]
    _run("tc", "filter", "add", *at, "bpf", "bytecode", program, *into_the_hole)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise NetworkError(f"`{' '.join(command)}`: {result.stderr.strip()}")
