#!/usr/bin/env python3
"""Stands in for ssh: ``agent.py HOST COMMAND...`` runs the command on a host of the lab.

Like ssh, it joins its arguments with blanks and leaves them to a shell: launchers quote them for
one. The environment is inherited, which ssh would not do.
"""

from __future__ import annotations

import json
import os
import sys

NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--wd")


def main() -> None:
    arguments = sys.argv[1:]
    while arguments and arguments[0].startswith("-"):  # ssh's own, such as -x
        del arguments[0]
    host, *command = arguments
    process = json.loads(os.environ["LAB_HOSTS"])[host]
    enter = ["nsenter", "--target", str(process), *NAMESPACES]
    os.execvp(enter[0], [*enter, "--", "sh", "-c", " ".join(command)])


if __name__ == "__main__":
    main()
