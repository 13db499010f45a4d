"""Breaks the code on purpose, one line at a time, and tells which tests notice.

    make test-mutations                     # all faults
    make test-mutations ARGS="ring lane"    # those with such words in their names
    make test-mutations ARGS="--quick"      # by `make test` alone

Each fault is made in a copy of the sources; the checkout stays as it is. Tests that are likely to
notice run first, so most faults take seconds. A fault that no test notices is printed, and the
status is then 1: write the test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from faults import FAULTS, Fault

TOP = Path(__file__).parents[2]
LIMIT_SECONDS = 900
"""Of one run of tests; a fault that makes it hang is noticed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose name has one of these words")
    parser.add_argument("--quick", action="store_true", help="only with the tests of `make test`")
    options = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if not options.words or any(word in fault.name for word in options.words)
    ]
    for _, command in suites(("unit", "ranks"), quick=True):
        failed = failure_of(command, TOP / "src")
        if failed:
            sys.exit(f"tests fail without any fault: {failed}")
    noticed = {"make test": 0, "make test-all": 0}
    missed = []
    for fault in chosen:
        began = time.monotonic()
        suite, test = notice(fault, options.quick)
        print(
            f"{time.monotonic() - began:5.0f} s  {fault.name}: {test or 'NOBODY NOTICED'}",
            flush=True,
        )
        if suite is None:
            missed.append(fault.name)
        else:
            noticed[suite] += 1
    print(f"{len(chosen)} faults: " + ", ".join(f"{n} by {suite}" for suite, n in noticed.items()))
    return 1 if missed else 0


def notice(fault: Fault, quick: bool) -> tuple[str | None, str]:
    """Which suite notices first, and the test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        break_code(fault, Path(folder) / "src")
        for suite, command in commands(fault, quick):
            failed = failure_of(command, Path(folder) / "src")
            if failed:
                return suite, failed
    return None, ""


def break_code(fault: Fault, sources: Path) -> None:
    """A copy of the sources with the fault in it."""
    shutil.copytree(
        TOP / "src", sources, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    path = sources / "mpiddl" / fault.file
    text = path.read_text()
    if text.count(fault.right) != 1:
        sys.exit(f"{fault.name}: {fault.file} has {text.count(fault.right)} times {fault.right!r}")
    path.write_text(text.replace(fault.right, fault.wrong))


def commands(fault: Fault, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """Runs of tests, the most likely to notice first."""
    yield from suites(fault.tests, quick=True)
    if not quick:
        yield from suites(fault.tests, quick=False)
    yield from suites(("unit", "ranks"), quick=True)
    if not quick:
        yield from suites(("ranks",), quick=False)


def suites(tests: tuple[str, ...], quick: bool) -> Iterator[tuple[str, list[str]]]:
    """``make test``'s way to run these, or what ``make test-all`` runs beyond."""
    pytest = ["python", "-m", "pytest", "-q", "-x", "--tb=no"]
    pytest += ["--hypothesis-profile", "no-shrinking"]
    unit = [f"tests/{name}" for name in tests if name.startswith("unit")]
    ranks = [f"tests/{name}" for name in tests if name.startswith("ranks")]
    if unit and quick:
        yield "make test", [*pytest, *unit]
    if ranks and quick:
        yield "make test", [*on(3), *pytest, *ranks, "-m", "not thorough"]
    if ranks and not quick:
        yield "make test-all", [*on(3), *pytest, *ranks, "-m", "thorough"]
        yield "make test-all", [*on(4), *pytest, *ranks, "-m", "layout", "--hypothesis-seed", "4"]
        late = ["--hypothesis-seed", "2", "--device", "standin"]
        yield "make test-all", [*on(2), *pytest, *ranks, "-m", "device", *late]


def on(ranks: int) -> list[str]:
    return [str(TOP / "tools" / "mpirun"), "-n", str(ranks)]


def failure_of(command: list[str], sources: Path) -> str:
    """The first test that failed; empty if all passed, or none was chosen."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(sources),
        "MPIDDL_TIMEOUT": "15",
        "NO_COLOR": "1",
    }
    try:
        done = subprocess.run(
            command,
            cwd=TOP,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {LIMIT_SECONDS} s"
    if done.returncode in (0, 5):  # 5: no test was chosen
        return ""
    lines = (done.stdout + done.stderr).splitlines()
    named = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    alone = [line for line in lines if "failed alone in" in line or "nothing moved" in line]
    return (named + alone + [f"status {done.returncode}"])[0]


if __name__ == "__main__":
    sys.exit(main())
