"""What all suites share: how much of the matrix of parameters a run takes, and its seed."""

from __future__ import annotations

import pytest
from matrix import choose_matrix, thin


def pytest_addoption(parser):
    parser.addoption(
        "--matrix",
        choices=("pairs", "full"),
        default="pairs",
        help="of each test's parameters: every pair of values (default), or every combination",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # Ranks draw the same, and a failure is seen again: never a seed from the clock.
    config.option.hypothesis_seed = config.option.hypothesis_seed or "0"
    choose_matrix(config)


@pytest.hookimpl(trylast=True)  # what -k and -m leave
def pytest_collection_modifyitems(config, items):
    items[:], others = thin(items)
    if others:
        config.hook.pytest_deselected(items=others)
