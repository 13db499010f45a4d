"""The same pytest on every rank: one rank prints, all ranks fail together."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from mpi4py import MPI

import mpiddl
from mpiddl.collectives.choose import ALGORITHMS

EVERYONE = MPI.COMM_WORLD
TOP = Path(__file__).parents[2]


class DisagreementError(AssertionError):
    """A check failed on some rank; raised on all of them."""


@pytest.fixture(scope="session")
def world():
    return mpiddl.init()


@pytest.fixture(scope="session")  # hypothesis refuses others
def agree():
    """``agree(condition, message)`` fails on every rank if it fails on one.

    Uses MPI itself, not the code under test. A plain assert on one rank would leave the others
    waiting in their next collective.
    """

    def check(condition, message=""):
        messages = EVERYONE.allgather(None if condition else str(message) or "disagrees")
        failed = [f"rank {r}: {text}" for r, text in enumerate(messages) if text is not None]
        if failed:
            raise DisagreementError("; ".join(failed))

    return check


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


def pytest_runtest_setup(item):
    """The same tests run across hosts."""
    called = getattr(item, "callspec", None)
    name = called.params.get("algorithm") if called else None
    if name in ALGORITHMS and ALGORITHMS[name].one_node and mpiddl.init().num_nodes > 1:
        pytest.skip("works within one node")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    error = call.excinfo.value if call.excinfo else None
    alone = error is not None and not isinstance(
        error, DisagreementError | pytest.skip.Exception | pytest.fail.Exception
    )
    if alone and EVERYONE.Get_size() > 1:
        # This rank's peers may be waiting for it: end the job, but say why first.
        sys.__stderr__.write(
            f"\nrank {EVERYONE.Get_rank()} of {EVERYONE.Get_size()} failed alone in {item.nodeid}\n"
            f"{outcome.get_result().longreprtext}\n"
        )
        sys.__stderr__.flush()
        EVERYONE.Abort(1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if EVERYONE.Get_rank() > 0:
        reporter = config.pluginmanager.getplugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - for the whole run
