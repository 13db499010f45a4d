"""What tests of training programs have in common."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

TOP = Path(__file__).parents[2]


def program(name: str, *flags: object) -> list[str]:
    """The command line of a job, for ``start``."""
    return ["python", f"jobs/{name}.py", *map(str, flags)]


def module(name: str) -> ModuleType:
    """A job's functions, for what needs no ranks."""
    spec = importlib.util.spec_from_file_location(f"jobs_{name}", TOP / "jobs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses look types up
    spec.loader.exec_module(loaded)
    return loaded


def rows(out: Path) -> list[dict[str, float]]:
    """What was measured in each epoch."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def forget_all_but_the_first_checkpoint(out: Path) -> int:
    """As if the job had been killed after it. Returns: its step."""
    first, *later = sorted((out / "checkpoints").glob("step-*"))
    assert later
    for path in later:
        shutil.rmtree(path)
    return int(first.name.removeprefix("step-"))
