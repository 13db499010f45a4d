"""Each way out of a program, as the guard of a rank sees it. No MPI: to abort is to print."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

GUARDED = """
    from sys import exit as leave
    import contextlib, os, sys
    from mpiddl.launch import exit as failure

    def abort(status):
        os.write(1, f"abort {status}".encode())
        failure.end_process(0)

    failure.watch_exits(1, 2, "host", abort)
    def main(status):
        return status
    kept = []
"""


def aborted(tmp_path, way):
    """The status with which the job is ended where a script leaves in that way; None: it is not."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(GUARDED) + textwrap.dedent(way))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if not done.stdout:
        assert "ending the job" not in done.stderr
        return None
    assert "rank 1 of 2 on host" in done.stderr
    return int(done.stdout.removeprefix("abort "))


@pytest.mark.parametrize(
    ("way", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("raise SystemExit(main(3))", 3),
        ("raise SystemExit('a reason')", 1),
        ("raise SystemExit(256)", 1),
        ("sys.exit(256)", 1),
        ("leave(3)", 3),
        ("os._exit(3)", 3),
        ("os._exit(512)", 1),
        ("try:\n    leave(3)\nfinally:\n    main(0)", 3),
        ("with contextlib.suppress(ValueError):\n    raise SystemExit(3)", 3),
        ("try:\n    leave(3)\nexcept SystemExit as e:\n    kept.append(e)\n    raise", 3),
    ],
)
def test_a_status_ends_the_job(tmp_path, way, status):
    assert aborted(tmp_path, way) == status


KEEP = "try:\n    raise SystemExit(3)\nexcept SystemExit as error:\n    kept.append(error)\n"


@pytest.mark.parametrize(
    "way",
    [
        "",
        "raise SystemExit",
        "raise SystemExit(main(0))",
        "leave()",
        KEEP,
        KEEP + "raise SystemExit(0)",
        "raise failure.LeaveTogether(75)",
        "if os.fork() == 0:\n    os._exit(3)\nos.wait()",
        "print('text', file=sys.stderr, flush=True)",
    ],
)
def test_success_and_what_all_ranks_do_end_nothing(tmp_path, way):
    assert aborted(tmp_path, way) is None
