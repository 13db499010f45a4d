"""Jobs across several hosts, which benchmarks/lab makes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
LAB = [sys.executable, str(TOP / "benchmarks" / "lab")]


def _why_not() -> str | None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "the lab needs root on Linux"
    probe = subprocess.run(
        [*LAB, "--hosts", "1", "--", "true"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    refused = probe.returncode and probe.stderr.startswith(("lab: ", "unshare: ", "setpriv: "))
    return f"no lab here: {probe.stderr.strip()[-200:]}" if refused else None


def pytest_collection_modifyitems(items):
    if items and (reason := _why_not()):
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def environment():
    """Without the caller's settings."""
    return {name: text for name, text in os.environ.items() if not name.startswith("MPIDDL_")}


@pytest.fixture
def lab(environment):
    """``lab(["--hosts", "3"], "python", ...)`` runs a command on ranks of several hosts."""

    def run(options, *command, timeout=1200, env=None):
        return subprocess.run(
            [*LAB, *options, *(["--", *command] if command else [])],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment | (env or {}),
            cwd=TOP,
            check=False,
        )

    return run
