"""On this rank's GPU: what the ranks suite on ``--device cuda`` does not see.

    tools/mpirun -n 2 python -m pytest tests/gpu

No default device is set here, as in users' programs. Skipped without a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

from gpu_first import choose_gpu

choose_gpu()
from together import agree, pytest_configure, pytest_runtest_makereport  # noqa: E402, F401

import mpiddl  # noqa: E402
from mpiddl.devices.registry import device_at  # noqa: E402


def why_not():
    """Why nothing can be run here; "" if it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    return ""


def pytest_runtest_setup(item):
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def world():
    return mpiddl.init(device="cuda")


@pytest.fixture(scope="session")
def gpu(world):
    """What works on this rank's GPU."""
    return device_at(world.device)


@pytest.fixture(autouse=True)
def _plain_arithmetic():
    """Convolutions in float32 proper, as products are anyway, so that results can be compared."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
