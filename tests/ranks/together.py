"""What makes one test run of several processes: checks that fail on all, one voice."""

from __future__ import annotations

import os
import sys

import pytest
from mpi4py import MPI

EVERYONE = MPI.COMM_WORLD


class DisagreementError(AssertionError):
    """A check failed on some rank; raised on all of them."""


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
