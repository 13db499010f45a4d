"""What benchmarks/tables.py makes of results on GPUs, which no test can measure without one."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GPU = {"driver": "580.65", "torch_cuda": "13.0", "device": 0}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tables")


def row(algorithm, placement, staging, busbw, nbytes=1 << 20):
    names = {"algorithm": algorithm, "placement": placement, "staging": staging}
    return {**names, "busbw": busbw, "nbytes": nbytes, "dtype": "float32"}


def report():
    devices = [{"name": "H100", "uuid": "GPU-1"}]
    rank = {"gpu": GPU | {"devices": devices}, "node_cores": 16, "cpu": "a CPU"}
    facts = {"mpi": "Open MPI v5.0.11", "date": "2026-01-01T00:00", "commit": "abc"}
    memory = {"stream_gbps": 90.0, "copy_gbps": 3000.0, "peer_gbps": None, "pcie_gbps": 25.0}
    return {
        "environment": {**facts, "command": "mpiddl bench", "ucx": None, "ranks": [rank, rank]},
        "memory": memory | {"limit_gbps": 750.0},
        "rows": [
            row("auto", "empty", None, 600.0),
            row("auto", "plain", "host", 5.0),
            row("ring", "empty", "device", 80.0),
            row("ring", "empty", "host", 20.0),
            row("ring", "plain", "host", 19.0),
            row("sendrecv", "empty", "device", 100.0),
            row("auto", "empty", None, 7.0, 2048),
        ],
    }


def test_gpu_results_become_a_table(tables, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "all_reduce_openmpi_2_ranks_one_gpu.json"
    file.write_text(json.dumps(report()))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    text = tables.tables(tables.GPU_RUNS, "all_reduce")

    assert "2 ranks on 1 x H100, driver 580.65, CUDA 13.0, copies within GPUs 3000 GB/s" in text
    head, _, large, small = [line for line in text.splitlines() if line.startswith("|")]
    cells = dict(zip(re.split(r" *\| *", head), re.split(r" *\| *", large), strict=True))
    assert cells["size"] == "1MiB"
    assert (cells["auto"], cells["auto/host"], cells["ring/host"]) == ("600.00", "5.00", "20.00")
    assert cells["auto: of the limit"] == "0.80"
    assert cells["ring/device: of sendrecv/device"] == "0.80"
    assert cells["ring/host: of PCIe"] == "0.80"
    assert small.split()[3] == "7.00"
    assert tables.tables(tables.RUNS, "all_reduce") == ""  # they are in no other table


def test_without_gpu_results_the_page_says_so(tables, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {n}: begin -->\n<!-- {n}: end -->\n" for n in NAMES))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables, "PAGE", page)
    tables.main()

    assert page.read_text().count("Nothing was measured on a GPU yet. `make bench-gpu`") == 1


NAMES = ("tables", "gpus", "overlap")
