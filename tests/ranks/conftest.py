"""The same pytest on every rank: one rank prints, all ranks fail together."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gpu_first import choose_gpu
from standin import in_place_of_the_host

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS
from mpiddl.collectives.nccl import nccl_missing, nccl_problem
from mpiddl.devices.registry import device_at

if "--device cuda" in " ".join(sys.argv).replace("--device=", "--device "):
    choose_gpu()
from together import (
    EVERYONE,
    agree,  # noqa: F401
    pytest_configure,  # noqa: F401
    pytest_runtest_makereport,  # noqa: F401
)

TOP = Path(__file__).parents[2]


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "standin", "cuda"),
        help="run all tests on the host, on a GPU made of threads, or on this rank's GPU",
    )


def world_of(config):
    """All ranks, on the kind of device that was asked for. Tests may be left out before the first
    of them has asked for a fixture."""
    chosen = config.getoption("device")
    return mpiddl.init(device="cpu" if chosen == "standin" else chosen)


@pytest.fixture(scope="session", autouse=True)
def world(request):
    """All ranks; what tests make is on the device that was asked for."""
    world = world_of(request.config)
    if request.config.getoption("device") == "standin":
        with in_place_of_the_host(world):
            yield world
    else:
        torch.set_default_device(world.device)
        yield world
        torch.set_default_device(None)


@pytest.fixture(scope="module", params=["device", "host"])
def device(request, world):
    """A stand-in for a GPU."""
    if request.config.getoption("device") == "cuda":
        pytest.skip("there is a GPU: tests/gpu has slow kernels")
    with in_place_of_the_host(world, staging=request.param) as device:
        yield device


@pytest.fixture(scope="session")
def gloo(world):
    """torch.distributed among the same ranks, for comparisons with it."""
    if world.num_nodes > 1:
        pytest.skip("gloo asks for an interface across hosts; compared within one node")
    from ddp import process_group

    with process_group(world):
        yield


@pytest.fixture
def shared_tmp_path():
    """One folder for all ranks. (pytest's ``tmp_path`` clears old ones, and ranks would race.)"""
    # Hosts share the checkout, but not their folder for temporary files.
    parent = TOP if mpiddl.init().num_nodes > 1 else None
    first = EVERYONE.Get_rank() == 0
    with tempfile.TemporaryDirectory(dir=parent) if first else nullcontext() as folder:
        yield Path(EVERYONE.bcast(folder))
        EVERYONE.Barrier()


def gpu_problem(config):
    """Why NCCL cannot be tested; None if it can."""
    if config.getoption("device") != "cuda":
        return "works on GPUs"
    world = world_of(config)
    return nccl_problem(device_at(world.device), world) or nccl_missing()


def pytest_runtest_setup(item):
    """The same tests run across hosts, and on GPUs."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = parameters.get("algorithm", parameters.get("name"))
    algorithm = ALGORITHMS.get(name) if isinstance(name, str) else None
    if algorithm and algorithm.one_node and world_of(item.config).num_nodes > 1:
        pytest.skip("works within one node")
    if algorithm and algorithm.gpu and (problem := gpu_problem(item.config)) is not None:
        pytest.skip(problem)
    on_gpu = item.config.getoption("device") != "cpu"
    if algorithm and algorithm.reach and on_gpu and parameters.get("where") != "window":
        pytest.skip("works on memory that is mapped")
    if on_gpu and item.get_closest_marker("host"):
        pytest.skip("about host memory")
