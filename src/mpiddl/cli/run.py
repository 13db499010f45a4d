"""Runs a command under mpirun so that help and usage errors are printed once, not n times."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from mpiddl.comm.launchers import read_launch
from mpiddl.comm.world import is_running
from mpiddl.errors import LaunchError, MpiddlError

__all__ = ["run", "speaks_once"]

Command = TypeVar("Command", bound=Callable[..., Any])

USAGE_ERROR = 2
GRACE_SECONDS = 2.0


def run(main: Callable[..., Any] | typer.Typer) -> None:
    """Parse ``sys.argv`` for ``main`` and call it.

    Before MPI is up only the launcher's rank 0 prints; every rank exits with the same status.
    An mpiddl error that leaves ``main`` is printed without a traceback.

    Args:
        main: A function whose parameters typer can read, or an app whose commands are
            decorated with ``speaks_once``.
    """
    app = main
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(speaks_once(main))
    if not read_launch().is_first:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as we live
    try:
        app()
    except SystemExit as leaving:
        # A launcher ends the job at the first rank that fails: rank 0 must have spoken by then.
        if leaving.code and not (read_launch().is_first or is_running()):
            time.sleep(GRACE_SECONDS)
        raise


def speaks_once(command: Command) -> Command:
    """Give ranks their voice back once the arguments are known to be right."""

    @functools.wraps(command)
    def speaking(*args: Any, **kwargs: Any) -> Any:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        try:
            return command(*args, **kwargs)
        except MpiddlError as error:
            # A wrong launch is wrong on all ranks alike; anything else may be this rank's alone.
            if read_launch().is_first or not isinstance(error, LaunchError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(USAGE_ERROR)

    return speaking  # type: ignore[return-value]
