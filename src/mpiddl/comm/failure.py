"""A rank that fails takes the job down at once, with rank, host and traceback.

Without this, the other ranks of an MPI job wait for ever for the one that raised (MPICH, Intel
MPI) or for the one that left with ``sys.exit(3)`` (all of them).
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from mpiddl.log import logger

__all__ = ["at_clean_exit", "install", "say_last"]

LAST_WORDS_SECONDS = 0.2
GRACE_SECONDS = 2.0
"""For rank 0 to tell what all ranks have met."""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_SHARED_MEMORY = re.compile(
    r"\s(/dev/shm/(?:mpich_shm_|sm_segment\.|vader_segment\.|mpiddl-)\S*)$", re.M
)

_installed = False
_exit_code: object = None  # what the sys.exit that ended the program was called with
_leaving = False  # the interpreter runs its exit handlers
_last_words: list[Callable[[], str]] = []
_at_clean_exit: list[Callable[[], None]] = []


def say_last(words: Callable[[], str]) -> None:
    """Add a line to what is said when this rank fails."""
    _last_words.append(words)


def at_clean_exit(action: Callable[[], None]) -> None:
    """Call ``action`` when this process leaves and has not failed."""
    _at_clean_exit.append(action)


def _leave_cleanly() -> None:
    for action in _at_clean_exit:
        action()


class _Exit(SystemExit):
    """A ``SystemExit`` that notices whether it ended the program.

    Neither excepthook nor atexit is told the status. But an exception that nobody caught is
    freed by the interpreter itself, when no Python code is running any more (or later, if it is
    part of a reference cycle); one that was caught is freed under the frame that caught it.
    """

    def __del__(self) -> None:
        global _exit_code
        if _leaving or sys._getframe().f_back is None:
            _exit_code = self.code


def _exit(code: object = None, /) -> NoReturn:
    """``sys.exit`` that lets the other ranks know, if it ends the program."""
    ends_thread_only = threading.current_thread() is not threading.main_thread()
    kind = SystemExit if ends_thread_only else _Exit
    raise kind() if code is None else kind(code)


def _status(code: object) -> int:
    """The process status that Python makes of ``sys.exit(code)``."""
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1


def install(rank: int, size: int, hostname: str, abort: Callable[[int], None]) -> None:
    """Wrap ``sys.excepthook`` and ``sys.exit`` of this process; once, however often called.

    Args:
        rank: World rank, for the message.
        size: World size. With one rank there is no job to end: Python's own behaviour stays.
        hostname: For the message.
        abort: Ends all ranks with the given status; does not return.
    """
    global _installed
    if _installed:
        return
    _installed = True
    os.register_at_fork(before=_ForkWarning(os.getpid()))
    if size == 1:
        atexit.register(_remove_shared_memory_files)
        atexit.register(_leave_unless_it_raised, os.getpid())
        return
    guard = _Guard(f"rank {rank} of {size} on {hostname}", rank == 0, abort)
    sys.excepthook = guard.on_exception
    sys.exit = _exit
    builtins.exit = builtins.quit = _exit  # type: ignore[assignment] # the site module's
    atexit.register(guard.at_exit)


def _leave_unless_it_raised(owner: int) -> None:
    if os.getpid() == owner and not hasattr(sys, "last_value"):
        _leave_cleanly()


class _Guard:
    """Ends the job when this process fails. A forked child is no rank, and left alone."""

    def __init__(self, name: str, speaks: bool, abort: Callable[[int], None]) -> None:
        self._name = name
        self._speaks = speaks
        self._abort = abort
        self._owner = os.getpid()
        self._inherited = sys.excepthook

    def on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._owner:
            self._inherited(kind, error, trace)
        elif issubclass(kind, KeyboardInterrupt):
            self._end("was interrupted; ending the job\n", INTERRUPTED)
        else:
            if getattr(error, "on_every_rank", False) and not self._speaks:
                time.sleep(GRACE_SECONDS)  # rank 0 says it, and ends the job
            lines = "".join(traceback.format_exception(kind, error, trace))
            self._end(f"failed; ending the job\n{lines}", 1)

    def at_exit(self) -> None:
        global _leaving
        if os.getpid() != self._owner:
            return
        _leaving = True
        gc.collect()
        status = _status(_exit_code)
        if status == 0 and hasattr(sys, "last_value"):  # another hook printed an exception
            status = 1
        if status != 0:
            self._end(f"exited with status {status}; ending the job\n", status)
        _leave_cleanly()

    def _end(self, what: str, status: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep the job up
            sys.stdout.flush()
            last = "".join(f"{words()}\n" for words in _last_words)
            sys.stderr.write(f"mpiddl: {self._name} {what}{last}")
            sys.stderr.flush()
        _remove_shared_memory_files()
        # A launcher that is busy drops what it has not read of an aborted rank's output, and nobody
        # tells how far it has read: seen with Open MPI and MPICH on loaded nodes.
        time.sleep(LAST_WORDS_SECONDS)
        self._abort(status)


def _remove_shared_memory_files() -> None:
    """Unlink the files in /dev/shm of MPI libraries and of mpiddl that this process has mapped.

    MPICH's abort leaves its own behind, and so does Open MPI where no mpirun cleans up after it.
    """
    with contextlib.suppress(OSError):
        mapped = set(_SHARED_MEMORY.findall(Path("/proc/self/maps").read_text()))
        for path in mapped:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


class _ForkWarning:
    """Warns once when this process forks: a forked child shares MPI's connections."""

    def __init__(self, owner: int) -> None:
        self._owner = owner
        self._warned = False

    def __call__(self) -> None:
        if self._warned or os.getpid() != self._owner:
            return
        self._warned = True
        logger.warning(
            "this process forks after mpiddl.init(); a forked child shares MPI's connections and "
            "can corrupt them. Start workers with another method, for example "
            "DataLoader(..., multiprocessing_context='forkserver')"
        )
