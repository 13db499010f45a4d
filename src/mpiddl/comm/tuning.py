"""What was measured on a cluster, so that ``auto`` need not guess: a small JSON file.

    {"mpiddl_tune": 1,
     "clusters": {"Open MPI v5.0.11, 2x4 ranks, cpu": {
         "measured": "2026-11-21",
         "choices": [{"up_to": 16384, "algorithm": "doubling", "chunk_bytes": 524288},
                     {"up_to": null, "algorithm": "hierarchical", "chunk_bytes": 1048576}],
         "training": {"0f3a...": {"bucket_size": 4194304, "engine": "thread"}}}}}

``mpiddl tune`` writes it into the user's cache folder, or to MPIDDL_TUNE. It is read by rank 0, and
its copy counts for everyone. ``training`` is what jobs with MPIDDL_TUNE have found out in their
first steps, by a fingerprint of their model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpiddl.base.log import logger
from mpiddl.base.settings import ALGORITHM_NAMES
from mpiddl.comm.layout import Layout
from mpiddl.launch import library

__all__ = [
    "Choice",
    "cluster_name",
    "read_choices",
    "read_training",
    "tune_file",
    "write_choices",
    "write_training",
]

FORMAT, VERSION = "mpiddl_tune", 1
_warned: set[Path] = set()


class Choice(NamedTuple):
    """For all-reduces up to ``up_to`` bytes, None: of any size."""

    up_to: int | None
    algorithm: str
    chunk_bytes: int


def cluster_name(layout: Layout, kind: str = "cpu") -> str:
    """What results depend on: the MPI library, hosts x ranks per host, the kind of device."""
    sizes = sorted({len(ranks) for ranks in layout.nodes})
    ranks = "-".join(map(str, sizes))
    mpi = library.describe()["library"]
    return f"{mpi}, {layout.num_nodes}x{ranks} ranks, {kind}"


def tune_file(setting: str) -> Path:
    """``setting`` is MPIDDL_TUNE, empty for the default."""
    if setting:
        return Path(setting)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "mpiddl" / "tune.json"


def read_choices(setting: str, layout: Layout, kind: str = "cpu") -> list[Choice]:
    """What was measured for this cluster, from small to large; empty if nothing was.

    A file that is not ours, or broken, is ignored with one warning.
    """
    path = tune_file(setting)
    try:
        return _choices(path, cluster_name(layout, kind))
    except FileNotFoundError:
        if not setting:
            return []
        problem = "there is no such file"
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = f"not a table that `mpiddl tune` wrote ({type(error).__name__}: {error})"
    if path not in _warned:
        logger.warning("%s is ignored: %s; run `mpiddl tune` to make one", path, problem)
    _warned.add(path)
    return []


def _choices(path: Path, cluster: str) -> list[Choice]:
    entry = _clusters(path).get(cluster)
    if entry is None or (isinstance(entry, dict) and "choices" not in entry):
        return []
    choices = [Choice(c["up_to"], c["algorithm"], int(c["chunk_bytes"])) for c in entry["choices"]]
    bounds = [choice.up_to for choice in choices]
    if bounds[-1] is not None or bounds[:-1] != sorted(map(int, bounds[:-1])):  # type: ignore[arg-type]
        raise ValueError("sizes out of order")
    if any(c.algorithm not in ALGORITHM_NAMES[1:] or c.chunk_bytes < 1 for c in choices):
        raise ValueError("unknown algorithm or chunk size")
    return choices


def _clusters(path: Path) -> dict[str, Any]:
    table = json.loads(path.read_text())
    if table[FORMAT] != VERSION:
        raise ValueError(f"version {table[FORMAT]}, this mpiddl reads {VERSION}")
    clusters: dict[str, Any] = table["clusters"]
    if not isinstance(clusters, dict):
        raise ValueError("clusters have no names")
    return clusters


def write_choices(path: Path, cluster: str, measured: str, choices: Sequence[Choice]) -> None:
    """Replace this cluster's choices; the rest stays.

    Raises:
        OSError: It cannot be written.
    """
    try:
        clusters = _clusters(path)
    except (OSError, ValueError, TypeError, LookupError):
        clusters = {}
    kept = clusters.get(cluster, {})
    entry = {"measured": measured, "choices": [choice._asdict() for choice in choices]}
    _write(path, {**clusters, cluster: {**kept, **entry}})


def read_training(setting: str, layout: Layout, model: str, kind: str) -> Any:
    """What a job found out for a model with this fingerprint; None if none did.

    Only from a file that MPIDDL_TUNE names. The caller sees whether the values can be used.
    """
    if not setting:
        return None
    try:
        return _clusters(Path(setting))[cluster_name(layout, kind)]["training"][model]
    except (OSError, ValueError, TypeError, LookupError):
        return None


def write_training(
    setting: str, layout: Layout, model: str, found: dict[str, Any], kind: str
) -> None:
    """Remember what this job found out, in the file that MPIDDL_TUNE names, if it names one.

    Raises:
        OSError: It cannot be written.
    """
    if not setting:
        return
    path, cluster = Path(setting), cluster_name(layout, kind)
    try:
        clusters = _clusters(path)
    except (OSError, ValueError, TypeError, LookupError):
        clusters = {}
    kept = clusters.get(cluster, {})
    training = {**kept.get("training", {}), model: found}
    _write(path, {**clusters, cluster: {**kept, "training": training}})


def _write(path: Path, clusters: dict[str, Any]) -> None:
    """The file is whole at any moment."""
    text = json.dumps({FORMAT: VERSION, "clusters": clusters}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
