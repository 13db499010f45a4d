"""What the test whether MPI reads GPU memory has found out, kept per node for the next job.

    {"mpiddl_probe": 1,
     "found": {"<fingerprint>": {"answer": "yes", "reason": "...", "library": "Open MPI v5.0.11",
                                 "expires": null, "measured": "2026-11-21"}}}

One file per node in the user's cache folder, so that nodes do not overwrite each other's. A file
that cannot be read or written is no file: the test runs again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpiddl.launch.launchers import without_launcher
from mpiddl.launch.library import EAGER_LIMIT

__all__ = ["cache_file", "fingerprint", "recall", "remember", "settings_of"]

FORMAT, VERSION = "mpiddl_probe", 1
KEPT = 32
"""Answers in a file; the oldest go first."""

_SETTINGS = re.compile(
    r"(UCX|OMPI_MCA|OPAL|I_MPI|MPIR_CVAR|MPICH|MV2|MVP|FI|PSM2|PSP)_"
    r"|(LD_LIBRARY_PATH|LD_PRELOAD|MPI4PY_LIBMPI)$"
)
_WITHOUT_EFFECT = ("OMPI_MCA_mpi_yield_when_idle", EAGER_LIMIT)  # mpiddl's own, by job size


def settings_of(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how an MPI library treats GPU memory; launchers' are left out."""
    chosen = {
        name: text
        for name, text in sorted(without_launcher(environ).items())
        if _SETTINGS.match(name) and name not in _WITHOUT_EFFECT
    }
    if "LD_LIBRARY_PATH" in chosen:  # launchers put their folder in front, once per start
        folders = chosen["LD_LIBRARY_PATH"].split(os.pathsep)
        chosen["LD_LIBRARY_PATH"] = os.pathsep.join(dict.fromkeys(folders))
    return chosen


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Of all that an answer depends on. Files count with their size and age."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cache_file(hostname: str, environ: Mapping[str, str] = os.environ) -> Path:
    """In the user's cache folder."""
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = re.sub(r"[^\w.-]", "_", hostname)
    return Path(cache) / "mpiddl" / "gpu" / f"{name}.json"


def recall(path: Path, key: str) -> tuple[str, str] | None:
    """The answer and its reason, if one is known and still holds."""
    entry = _entries(path).get(key)
    try:
        expires = entry["expires"]  # type: ignore[index]
        if expires is not None and time.time() > expires:
            return None
        return str(entry["answer"]), str(entry["reason"])  # type: ignore[index]
    except (TypeError, LookupError):
        return None


def remember(
    path: Path, key: str, answer: str, reason: str, library: str, seconds: float | None
) -> None:
    """Keep an answer; ``seconds`` says for how long, None until something it depends on changes."""
    entry = {
        "answer": answer,
        "reason": reason,
        "library": library,
        "expires": None if seconds is None else time.time() + seconds,
        "measured": datetime.date.today().isoformat(),
    }
    entries = {name: kept for name, kept in _entries(path).items() if name != key}
    kept = dict([*entries.items(), (key, entry)][-KEPT:])
    with contextlib.suppress(OSError):
        _write(path, json.dumps({FORMAT: VERSION, "found": kept}, indent=1) + "\n")


def _entries(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        found = table["found"] if table[FORMAT] == VERSION else {}
    except (OSError, ValueError, TypeError, LookupError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, text: str) -> None:
    """The file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
