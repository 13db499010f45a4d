"""A command in namespaces of its own, of which nothing is left when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

__all__ = ["run_in_namespaces"]


def run_in_namespaces(command: Sequence[str]) -> int:
    """Run ``command`` as the first process of PID, network and mount namespaces.

    Ctrl-C, SIGTERM and SIGHUP end all processes in there, and so does the death of this one.

    Returns:
        Its exit status, as shells report it.
    """
    # Each process dies with the one that started it: of SIGKILL here, too.
    namespaces = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child"]
    namespaces += ["--pid", "--mount-proc", "--net", "--mount"]
    process = subprocess.Popen([*namespaces, *command])
    stopped_by: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped_by.append(number)
        first = _first_process(process.pid)
        if first is None:  # not yet started
            process.kill()
        else:
            # unshare returns when the kernel has ended every process of the namespace.
            os.kill(first, signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    status = process.wait()
    if stopped_by:
        return 128 + stopped_by[0]
    return status if status >= 0 else 128 - status


def _first_process(unshare: int) -> int | None:
    """The process that all others of the namespace die with."""
    try:
        children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None
