"""The tables of one run of benchmarks/all_reduce.py --device cuda."""

from __future__ import annotations

from typing import Any

__all__ = ["NOTHING_YET", "gpu_facts", "gpu_line"]

NOTHING_YET = (
    "Nothing was measured on a GPU yet. `make bench-gpu`, on a machine that has one, fills this."
)
Row = dict[str, Any]


def gpu_line(report: dict[str, Any], rows: list[Row]) -> dict[str, str]:
    """busbw of every way at one size, on ``mpiddl.empty`` where it can, and what bounds it."""
    best: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        way = row["algorithm"], row["staging"]
        if way not in best or row["placement"] == "empty":
            best[way] = row
    busbw = {way: row["busbw"] for way, row in best.items()}
    cells = {_name(way): f"{value:.2f}" for way, value in busbw.items()}
    memory = report["memory"]
    bounds = [
        (("auto", None), memory["limit_gbps"], "auto: of the limit"),
        (("ring", "device"), busbw.get(("sendrecv", "device")), "ring/device: of sendrecv/device"),
        (("ring", "host"), memory["pcie_gbps"], "ring/host: of PCIe"),
    ]
    for way, bound, name in bounds:
        if way in busbw and bound:
            cells[name] = f"{busbw[way] / bound:.2f}"
    return cells


def gpu_facts(report: dict[str, Any]) -> list[str]:
    """The GPUs, their software and their bandwidths."""
    environment, memory = report["environment"], report["memory"]
    gpus = [rank["gpu"] for rank in environment["ranks"]]
    devices = [gpu["devices"][gpu["device"]] for gpu in gpus]
    first, count = gpus[0], len({device["uuid"] for device in devices})
    ucx = (environment.get("ucx") or {}).get("version")
    facts = [
        f"{len(gpus)} ranks on {count} x {devices[0]['name']}",
        f"driver {first['driver']}, CUDA {first['torch_cuda']}",
        *([f"UCX {ucx}"] if ucx else []),
        f"copies within GPUs {memory['copy_gbps']:.0f} GB/s",
    ]
    if memory["peer_gbps"] is not None:
        facts.append(f"from a peer {memory['peer_gbps']:.0f}")
    return [*facts, f"PCIe {memory['pcie_gbps']:.1f} each way for each rank"]


def _name(way: tuple[str, str | None]) -> str:
    algorithm, staging = way
    return algorithm if staging is None else f"{algorithm}/{staging}"
