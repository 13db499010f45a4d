"""A rank that fails takes the job down at once, with rank, host and traceback.

Without this, the other ranks of an MPI job wait for ever for the one that raised (MPICH, Intel
MPI) or for the one that left with ``sys.exit(3)`` (all of them). Where a rank leaves in a way that
nothing here sees, its peers notice (``observe/watchdog.py``).
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import dis
import gc
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import NoReturn

from mpiddl.base.log import logger

__all__ = ["LeaveTogether", "at_clean_exit", "end_process", "say_last", "watch_exits"]

LAST_WORDS_SECONDS = 0.2
GRACE_SECONDS = 2.0
"""For rank 0 to tell what all ranks have met."""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_SHARED_MEMORY = re.compile(
    r"\s(/dev/shm/(?:mpich_shm_|sm_segment\.|vader_segment\.|mpiddl-)\S*)$", re.M
)

end_process = os._exit
"""The system's own, which this module replaces: says nothing, and asks no MPI."""

_installed = False
_guard: _Guard | None = None
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


class LeaveTogether(SystemExit):
    """Ends the program of *every* rank with the same status: nobody stays behind, and waits."""

    on_every_rank = True


class _Exit(SystemExit):
    """A ``SystemExit`` that notices whether it ended the program.

    Neither excepthook nor atexit is told the status. But an exception that nobody caught is
    freed by the interpreter itself, when no Python code is running any more (or later, if it is
    part of a reference cycle); one that was caught is freed under the frame that caught it.
    """

    def __del__(self) -> None:
        if _guard is not None and (_guard.leaving or sys._getframe().f_back is None):
            _guard.program_left(self.code)


def _exit(code: object = None, /) -> NoReturn:
    """``sys.exit`` that lets the other ranks know, if it ends the program."""
    ends_thread_only = threading.current_thread() is not threading.main_thread()
    kind = SystemExit if ends_thread_only else _Exit
    raise kind() if code is None else kind(code)


def _status(code: object) -> int:
    """The status of the job where a rank leaves with ``sys.exit(code)``.

    It is Python's own, but for codes such as 256: of those nothing is left in the eight bits that
    a process can tell, and a failure would pass for success.
    """
    if code is None:
        return 0
    if not isinstance(code, int):
        return 1
    return code & 0xFF or int(code != 0)


def _replace_exit() -> None:
    """``sys.exit`` becomes ours, also where a module has imported it by name."""
    theirs = sys.exit
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            # Not vars(), which makes a lazy module load.
            names = object.__getattribute__(module, "__dict__")
            for name in [name for name, value in names.items() if value is theirs]:
                names[name] = _exit
    builtins.exit = builtins.quit = _exit  # type: ignore[assignment] # the site module's


class _MainFrame:
    """Where the main program is, for ``raise SystemExit(3)``, which passes by all hooks.

    The interpreter flushes ``sys.stderr`` when the script has ended, while the exception that
    ended it still lives; that is the one moment at which anybody can see it. (``python -c`` and
    ``python -m`` do not flush.)
    """

    def __init__(self, left: Callable[[object], None]) -> None:
        main = sys._current_frames()[threading.main_thread().ident or 0]
        self._frame = _outermost(main)
        self._left = left
        self._stream = sys.stderr
        self._inherited = self._stream.flush
        self._stream.flush = self._flush  # type: ignore[method-assign]

    def _flush(self) -> None:
        if threading.current_thread() is threading.main_thread() and self._ended_by_exception():
            for code in self._codes():
                self._left(code)
        self._inherited()

    def _ended_by_exception(self) -> bool:
        frame = self._frame
        if _outermost(sys._getframe()) is frame:
            return False  # still running
        last = frame.f_code.co_code[frame.f_lasti]
        return not dis.opname[last].startswith("RETURN")

    def _codes(self) -> list[object]:
        """Of the SystemExit that has ended the main program.

        Others live, where somebody has caught and kept them. The one that is on its way has no
        traceback yet (Python 3.11), or has last passed the place where the program is; unless it
        was raised again.
        """
        alive = [
            error
            for error in gc.get_objects()
            if issubclass(type(error), SystemExit) and not isinstance(error, LeaveTogether)
        ]
        traces = [(error.__traceback__, error.code) for error in alive]
        on_its_way = [
            code
            for trace, code in traces
            if trace is None
            or (trace.tb_frame, trace.tb_lasti) == (self._frame, self._frame.f_lasti)
        ]
        passed = [code for trace, code in traces if trace and trace.tb_frame is self._frame]
        return on_its_way or passed


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def watch_exits(rank: int, size: int, hostname: str, abort: Callable[[int], None]) -> None:
    """Watch all ways out of this process; once, however often called.

    Args:
        rank: World rank, for the message.
        size: World size. With one rank there is no job to end: Python's own behaviour stays.
        hostname: For the message.
        abort: Ends all ranks with the given status; does not return.
    """
    global _installed, _guard
    if _installed:
        return
    _installed = True
    os.register_at_fork(before=_ForkWarning(os.getpid()))
    if size == 1:
        atexit.register(_remove_shared_memory_files)
        atexit.register(_leave_unless_it_raised, os.getpid())
        return
    _guard = _Guard(f"rank {rank} of {size} on {hostname}", rank == 0, abort)
    sys.excepthook = _guard.on_exception
    os._exit = _guard.on_os_exit
    _replace_exit()
    with contextlib.suppress(AttributeError):  # no stderr, or one that is no file of Python's
        _MainFrame(_guard.program_left)
    atexit.register(_guard.at_exit)


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
        self._status = 0
        self.leaving = False

    def program_left(self, code: object) -> None:
        """``code`` is that of the SystemExit that has ended the program."""
        if os.getpid() == self._owner and _status(code) != 0:
            self._status = _status(code)
            # In front of all handlers that were registered since, some of which may wait for
            # ranks that wait for this one.
            atexit.register(self.at_exit)

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

    def on_os_exit(self, status: int) -> NoReturn:
        """``os._exit``, which MPI's launchers take for an accident, whatever the status."""
        if os.getpid() == self._owner:
            # Whoever calls it wants to be gone, also where MPI is stuck.
            last_resort = threading.Timer(GRACE_SECONDS, end_process, (status,))
            last_resort.daemon = True
            last_resort.start()
            if _status(status) != 0:
                self._end(f"left by os._exit({status}); ending the job\n", _status(status))
            words = (
                f"mpiddl: {self._name} left by os._exit(0), at which an MPI may end the job "
                "without a word: let the script end, or call sys.exit()\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, words.encode())
            _leave_cleanly()
        end_process(status)

    def at_exit(self) -> None:
        if os.getpid() != self._owner:
            return
        self.leaving = True
        gc.collect()
        if self._status == 0 and hasattr(sys, "last_value"):  # another hook printed an exception
            self._status = 1
        if self._status != 0:
            self._end(f"exited with status {self._status}; ending the job\n", self._status)
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
