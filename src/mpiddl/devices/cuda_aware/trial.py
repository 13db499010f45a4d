"""Starts the test whether an MPI library reads GPU memory, in processes that may crash or hang.

Two ranks on this node, by the launcher that belongs to the library; where there is none, one
process that sends to itself. Nothing of it is left behind, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import psutil

from mpiddl.devices.cuda_aware.trial_rank import SIZES
from mpiddl.launch.launchers import without_launcher

__all__ = ["Outcome", "find_launcher", "run_test"]

GRACE = 5.0
"""Seconds that a launcher gets to end its ranks and to remove its files."""

_ENDING = (signal.SIGKILL, signal.SIGTERM)
_MODULE = "mpiddl.devices.cuda_aware.trial_rank"


class Outcome(NamedTuple):
    """How far the test came.

    Attributes:
        ranks: 2, or 1 where no launcher could start two.
        ready: GPU memory and all ranks were there; what comes after is the library's doing.
        passed: Largest message that arrived, in bytes; 0: none.
        problem: How it ended, if not well.
        timed_out: Whether it had to be stopped.
    """

    ranks: int
    ready: bool
    passed: int
    problem: str | None
    timed_out: bool = False


def run_test(
    library: str,
    path: str | None,
    device: int,
    environ: Mapping[str, str] = os.environ,
    timeout: float = 60.0,
    options: Sequence[str] = (),
) -> Outcome:
    """Send GPU memory through the MPI library, in child processes.

    Args:
        library: Its name and version.
        path: Its file.
        device: The GPU, as CUDA counts.
        environ: This process's; what its launcher put there is left out.
        timeout: Seconds, for all.
        options: More arguments of ``trial_rank``.
    """
    end = monotonic() + timeout
    clean = without_launcher(environ)
    root = Path(__file__).parents[3]
    if root.name not in ("site-packages", "dist-packages"):  # the child may not find it by itself
        clean["PYTHONPATH"] = os.pathsep.join(filter(None, (clean.get("PYTHONPATH"), str(root))))
    child = [sys.executable, "-m", _MODULE, "--device", str(device), *options]
    launcher = find_launcher(library, path, clean)
    if launcher is not None:
        outcome = _run([*launcher, *child], 2, clean, end)
        if outcome.ready or outcome.timed_out:
            return outcome
    alone = _run(child, 1, clean, end)
    if launcher is not None and not alone.ready:
        return outcome  # what kept two ranks from starting says more
    return alone


def find_launcher(library: str, path: str | None, environ: Mapping[str, str]) -> list[str] | None:
    """The command that starts two ranks of this library on this node; None if there is none.

    Looked for beside the library, where nobody else may have put it, then on the PATH.
    """
    names: tuple[str, ...]
    if "Open MPI" in library:
        names, banner = ("mpirun", "mpirun.openmpi"), "Open MPI|OpenRTE|prte"
        options = ["-n", "2", "--host", "localhost:2", "--bind-to", "none", "--oversubscribe"]
        if os.geteuid() == 0:
            options.append("--allow-run-as-root")
    elif re.search("MPICH|MVAPICH|Intel", library) and "CRAY" not in library:
        names = ("mpiexec.hydra", "mpiexec.mpich", "mpiexec")
        banner = "Intel" if "Intel" in library else "HYDRA"
        options = ["-launcher", "fork", "-n", "2"]
    else:
        return None
    folders = [Path(folder) for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    programs = [
        *_beside(path, names),
        *(str(folder / name) for folder in folders for name in names),
    ]
    for program in dict.fromkeys(programs):
        if os.access(program, os.X_OK) and re.search(banner, _version_of(program, environ)):
            return [program, *options]
    return None


def _beside(library: str | None, names: Sequence[str]) -> list[str]:
    """Programs of these names in the ``bin`` of each folder around ``library``.

    Some folder up there may be one in which everybody can make a ``bin``. So only those that belong
    to root, to this user or to the owner of the library, which runs already, and that nobody else
    can write.
    """
    if library is None:
        return []
    owners = {0, os.geteuid()}
    with contextlib.suppress(OSError):
        owners.add(os.stat(library).st_uid)
    folders = [parent / "bin" for parent in Path(library).parents]
    safe = [folder for folder in folders if _is_safe(folder, owners)]
    programs = [folder / name for folder in safe for name in names]
    return [str(program) for program in programs if _is_safe(program, owners)]


def _is_safe(path: Path, owners: Collection[int]) -> bool:
    """Whether none but ``owners`` can change it; the folder that a link leads to counts as well."""
    with contextlib.suppress(OSError, RuntimeError):
        target = path.resolve(strict=True)
        states = [target.stat(), target.parent.stat()] if path.is_symlink() else [target.stat()]
        return all(state.st_uid in owners and not state.st_mode & stat.S_IWOTH for state in states)
    return False


def _version_of(program: str, environ: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the program is the launcher found above
            [program, "--version"],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _run(command: list[str], ranks: int, environ: Mapping[str, str], end: float) -> Outcome:
    """Run one job of the test until ``end`` at the latest."""
    seconds = max(1.0, end - monotonic())
    with tempfile.TemporaryDirectory(prefix="mpiddl-probe-") as folder:
        report, output = Path(folder) / "report", Path(folder) / "output"
        limits = ["--ranks", str(ranks), "--limit", str(int(seconds + 2 * GRACE))]
        try:
            status = _finish([*command, *limits, "--report", str(report)], environ, output, seconds)
        except OSError as error:
            return Outcome(ranks, False, 0, f"{command[0]}: {error.strerror}")
        told = report.read_text(errors="replace") if report.exists() else ""
        printed = output.read_text(errors="replace")
    for file in re.findall(r"^uses (\S+)", told, re.MULTILINE):  # a library that crashed left it
        Path(file).unlink(missing_ok=True)
    ready = re.search(r"^ready$", told, re.MULTILINE) is not None
    passed = max(map(int, re.findall(r"^passed (\d+)", told, re.MULTILINE)), default=0)
    problem: str | None = None
    if status is None:
        problem = f"no answer after {seconds:.0f} s"
    elif failed := re.search(r"^failed (.*)", told, re.MULTILINE):
        problem = failed.group(1)
    elif status != 0 or passed != SIZES[-1]:
        problem = _described(status, printed) + ("" if ready else _last_line(printed))
    return Outcome(ranks, ready, passed, problem, status is None)


def _finish(
    command: list[str], environ: Mapping[str, str], output: Path, seconds: float
) -> int | None:
    """The exit status of a command; None if it had to be ended.

    Raises:
        OSError: It cannot be started.
    """
    # A file, not a pipe: a process that outlives the launcher would keep a pipe open.
    with output.open("wb") as printed:
        process = subprocess.Popen(  # noqa: S603 - this program, or its launcher with it
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a job: the launcher gently, then all by force.

    Launchers give their ranks process groups of their own, but the session stays the same.
    """
    if process.poll() is None:
        started = _descendants(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    else:
        started = []
    for member in {*started, *_session(process.pid)}:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def _described(code: int, output: str) -> str:
    """How the job ended; launchers turn a rank's SIGSEGV into statuses of their own."""
    told = [int(number) for number in re.findall(r"signal:? (\d+)", output, re.IGNORECASE)]
    told.append(-code if code < 0 else code - 128)
    # The other ranks were killed because the first one had gone.
    cause = next((number for number in told if number not in _ENDING), told[0])
    with contextlib.suppress(ValueError):
        name = signal.Signals(cause).name
        return f"killed by {name}" if code < 0 else f"exit status {code} ({name})"
    return f"exit status {code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return f": {lines[-1][:200]}" if lines else ""
