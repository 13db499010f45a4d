"""Traps of GPUs, in facts as ranks would report them; there is no GPU here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from mpiddl.cli.doctor import _show
from mpiddl.doctor.gpus import describe_device, gpu_facts
from mpiddl.doctor.traps import find_traps

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 << 30, "capability": "9.0"}


def devices(*numbers):
    return [{**H100, "uuid": f"GPU-{n}", "pci": f"0000:{n:02x}:00.0"} for n in numbers]


def gpu(**changes):
    return {
        "driver": "580.159.04",
        "driver_cuda": "13.0",
        "torch_cuda": "13.0",
        "torch_nccl": "2.27.3",
        "cupy": "cupy-cuda13x 14.2.0",
        "cupy_cuda": "13.0",
        "cupy_nccl": None,
        "cupy_problem": None,
        "devices": devices(0, 1),
        "device": 0,
        "visible": None,
        "binding": None,
        "allocator": None,
        "torch_threads": 1,
        **changes,
    }


def mpi(**changes):
    return {
        "library": "Open MPI v5.0.11",
        "path": "/opt/libmpi.so",
        "thread_level": "MPI_THREAD_MULTIPLE",
        "cuda_aware": "yes",
        "cuda_aware_reason": "tested",
        "ucx": {"version": "1.22.0", "path": "/opt/libucp.so.0", "cuda": True},
        "ucx_tls": None,
        "ucx_memtype_cache": None,
        "defaults": {},
        "tcp_eager_bytes": None,
        **changes,
    }


def rank(number=0, hostname="a", mpi_changes=None, **changes):
    return {
        "hostname": hostname,
        "cores": [0, 1],
        "node_cores": 2,
        "omp_num_threads": "1",
        "threads_rule": "OMP_NUM_THREADS=1",
        "start_method": "forkserver",
        "shared_memory_bytes": 1 << 33,
        "interfaces": [],
        "versions": {"torch": "2", "mpiddl": "0", "python": "3", "mpi4py": "4"},
        "gpu": gpu(device=number, **changes) if "device" not in changes else gpu(**changes),
        "mpi": mpi(**(mpi_changes or {})),
        "place": {"rank": number, "local_rank": number, "local_size": 2, "chunk_bytes": 1 << 19},
    }


def both(mpi_changes=None, **changes):
    return [rank(number, "a", mpi_changes, **changes) for number in (0, 1)]


def apart(first, second):
    """Two ranks that each see other GPUs, and use the first of them."""
    return [rank(0, device=0, **first), rank(1, device=0, **second)]


WITHOUT_UUID = [{**device, "uuid": None} for device in devices(0)]
BOUND = {"binding": "--gpus-per-task=1"}
UCX = {"path": "/opt/libucp.so.0", "cuda": True}
EXPANDABLE = "max_split_size_mb:64,expandable_segments:True"


@pytest.mark.parametrize(
    ("ranks", "severity", "what", "fix"),
    [
        (both(torch_cuda=None, devices=[], device=None), "warning", "built for the CPU", "13.0"),
        (both(devices=[], device=None), "warning", "sees no GPU", "--gpus-per-node"),
        (both(devices=[], device=None, visible=""), "warning", "CUDA_VISIBLE_DEVICES=)", "unset"),
        (both(driver_cuda="12.8"), "error", "knows CUDA up to 12.8", "CUDA 12,"),
        (both(torch_cuda="13.2", cupy_cuda="13.2"), "note", "but for kernels", "newer driver"),
        (both(cupy=None, cupy_cuda=None), "error", "CuPy, with which", "mpiddl[cuda13]"),
        (both(cupy_cuda=None, cupy_problem="ImportError: x"), "error", "ImportError: x", "force"),
        (
            both(cupy="cupy-cuda12x 13.6.0", cupy_cuda="12.9"),
            "warning",
            "CuPy is built for CUDA 12.9, torch for 13.0",
            "pip uninstall cupy-cuda12x; pip install 'mpiddl[cuda13]'",
        ),
        (both(allocator=EXPANDABLE), "warning", "expandable_segments:True", "unset"),
        (both(allocator="backend: cudaMallocAsync"), "warning", "cudaMallocAsync", "unset"),
        (
            apart({"devices": devices(0)}, {"devices": devices(1)}),
            "warning",
            "see different GPUs",
            "--gpu-bind=none",
        ),
        (
            apart({"devices": devices(0), **BOUND}, {"devices": devices(1), **BOUND}),
            "warning",
            "see different GPUs",
            "--gpu-bind=none instead of --gpus-per-task=1",
        ),
        (
            apart(
                {"devices": WITHOUT_UUID, "visible": "0"}, {"devices": WITHOUT_UUID, "visible": "1"}
            ),
            "warning",
            "see different GPUs",
            "--gpu-bind=none",
        ),
        (both(device=0), "note", "2 ranks on a use one GPU, although 2 are visible", "device="),
        (
            both(devices=devices(0), device=0),
            "note",
            "2 ranks on a share 1 GPU(s)",
            "ask for 2 GPUs per node. Where it is wanted: CUDA's MPS",
        ),
        (both({"ucx_tls": "rc,sm"}), "warning", "has no cuda_copy", "UCX_TLS=rc,sm,cuda"),
        (both({"ucx_tls": "^cuda"}), "warning", "has no cuda_copy", "unset UCX_TLS"),
        (both({"ucx_tls": "^cuda_copy,ib"}), "warning", "has no cuda_copy", "unset UCX_TLS"),
        (both({"ucx_tls": "rc,cuda_copy"}), "note", "has no cuda_ipc", "rc,cuda_copy,cuda"),
        (both({"ucx_tls": "^cuda_ipc"}), "note", "has no cuda_ipc", "unset UCX_TLS"),
        (
            both({"ucx": {**UCX, "version": "1.12.0"}}),
            "warning",
            "UCX 1.12.0 may miss",
            "UCX_MEMTYPE_CACHE=n",
        ),
        (both({"ucx_memtype_cache": "y"}), "note", "UCX_MEMTYPE_CACHE=y", "unset"),
        (
            both({"cuda_aware": "no", "cuda_aware_reason": "SIGSEGV"}),
            "note",
            "cannot read GPU memory, so that it goes through host memory: SIGSEGV",
            "docs/gpu.md",
        ),
        (both({"cuda_aware": "unknown"}), "note", "is not known to read", "docs/gpu.md"),
    ],
)
def test_traps_are_found(ranks, severity, what, fix):
    found = find_traps(ranks)
    assert [trap.severity for trap in found] == [severity], found
    assert what in found[0].what
    assert fix in found[0].fix


@pytest.mark.parametrize(
    "ranks",
    [
        both(),
        both(driver_cuda="13.2"),
        both(allocator="expandable_segments:False,max_split_size_mb:64"),
        both({"ucx_tls": "rc,sm,cuda"}),
        both({"ucx_tls": "all"}),
        both({"ucx_tls": "^ud"}),
        both({"ucx_tls": "rc,cuda_copy,cuda_ipc"}),
        both({"ucx_tls": "tcp", "ucx": None}),
        both({"ucx": {**UCX, "version": "1.10.0"}, "ucx_memtype_cache": "n"}),
        both({"ucx": {**UCX, "version": "libucp.so.0"}}),
        both({"ucx": {**UCX, "version": "1.12.1"}}),
        both(binding="--gpu-bind=closest"),  # and yet each sees all
        # All GPUs in another order; one rank per node; on two nodes the same number each.
        [rank(0), rank(1, device=0, devices=devices(1, 0), visible="1,0")],
        [rank(0, **BOUND, devices=devices(0))],
        [rank(0, devices=devices(0)), rank(0, "b", devices=devices(1))],
        # No GPU is in sight, so nothing of this matters.
        both(driver=None, driver_cuda=None, torch_cuda=None, devices=[], device=None, cupy=None),
        both({"ucx_tls": "rc", "cuda_aware": "no"}, driver=None, devices=[], device=None),
        [{**rank(0), "mpi": None, "place": None}],
    ],
    ids=lambda ranks: None,
)
def test_no_trap_where_all_is_well(ranks):
    assert find_traps(ranks) == []


def test_doctor_shows_gpus(capsys):
    ranks = both({"cuda_aware_reason": "tested: all"}, visible="0,1")
    copies = [
        {"hostname": "a", "node_rank": 0, "local_rank": 0, "from_gbps": [None, 200.04]},
        {"hostname": "a", "node_rank": 0, "local_rank": 1, "from_gbps": [190.0, None]},
        {"hostname": "b", "node_rank": 1, "local_rank": 0, "from_gbps": [None, 1.0]},
    ]
    report = {"launcher": "srun", "ranks": ranks, "gpu_copies": copies, "traps": []}
    _show(json.loads(json.dumps(report)))

    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "torch built for 13.0, CuPy cupy-cuda13x 14.2.0 (CUDA 13.0)",
        "580.159.04, CUDA up to 13.0",
        "1: NVIDIA H100 80GB HBM3, 80GiB, PCI 0000:01:00.0, GPU-1",
        "torch 2.27.3",
        "1.22.0, CUDA transports loaded, /opt/libucp.so.0",
        "yes (tested: all)",
        "visible GPUs",
        "0,1",
        "GPU to GPU rank 0: 200.0 from 1 GB/s rank 1: 190.0 from 0 GB/s UCX",
    ):
        assert words in out, out


def test_a_device_is_named_with_all_that_torch_knows(monkeypatch):
    known = {"name": "NVIDIA H100", "total_memory": 80 << 30, "major": 9, "minor": 0}
    more = {"uuid": "GPU-7", "pci_domain_id": 0, "pci_bus_id": 27, "pci_device_id": 0}
    for extra, want in ((more, ("GPU-7", "0000:1b:00.0")), ({}, (None, None))):
        properties = SimpleNamespace(**known, **extra)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, p=properties: p)
        device = describe_device(0)
        assert (device["uuid"], device["pci"]) == want
        assert (device["name"], device["capability"]) == ("NVIDIA H100", "9.0")


def test_facts_are_json_and_complete():
    facts = gpu_facts(None)
    assert set(json.loads(json.dumps(facts))) == set(gpu())
