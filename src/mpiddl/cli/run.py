"""Runs a command under mpirun so that help and usage errors are printed once, not n times."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import typer

from mpiddl.comm.world import is_running
from mpiddl.errors import MpiddlError
from mpiddl.launch.exit import GRACE_SECONDS, LeaveTogether
from mpiddl.launch.launchers import read_launch

__all__ = ["deferred", "let_rank_0_speak", "run"]

USAGE_ERROR = 2
CLOSED_PIPE = 128 + signal.SIGPIPE

_chosen: list[Callable[[], Any]] = []


def run(main: Callable[..., Any] | typer.Typer) -> None:
    """Parse ``sys.argv`` for ``main`` and call it.

    While arguments are read only the launcher's rank 0 prints; every rank exits with the same
    status. An mpiddl error that leaves ``main`` is printed without a traceback.

    Args:
        main: A function whose parameters typer can read, or an app whose commands are
            ``deferred``.
    """
    app = main
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(deferred(main))
    if not read_launch().is_first:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - replaced or dropped below
    try:
        app()
    except SystemExit as leaving:
        if not _chosen:
            if leaving.code and not is_running():
                let_rank_0_speak()
            raise
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    # Called here and not by typer, whose frames would fill every traceback.
    command = _chosen.pop()
    try:
        command()
    except MpiddlError as error:
        # Before the world runs all ranks meet the same error; later it may be this rank's alone.
        everyones = error.on_every_rank or not is_running()
        if read_launch().is_first or not everyones:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not everyones:
            sys.exit(USAGE_ERROR)
        let_rank_0_speak()
        raise LeaveTogether(USAGE_ERROR) from None
    except BrokenPipeError:  # `mpiddl trace show | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is flushed there
        sys.exit(CLOSED_PIPE)


def let_rank_0_speak() -> None:
    """Wait a little before leaving with a failure that all ranks share.

    A launcher ends the job at the first rank that fails; rank 0 must have printed by then.
    """
    if not read_launch().is_first:
        time.sleep(GRACE_SECONDS)


def deferred(command: Callable[..., Any]) -> Callable[..., None]:
    """``command`` for typer to parse; ``run`` calls it once all arguments are known to be right."""

    @functools.wraps(command)
    def remember(*args: Any, **kwargs: Any) -> None:
        _chosen.append(functools.partial(command, *args, **kwargs))

    return remember
