"""File systems without locks: everything goes on, with one warning."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys
import textwrap

import pytest

# A filter of the kernel's: flock returns the error in this process from now on.
WITHOUT_FLOCK = """
import ctypes, struct, sys
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER, FLOCK = 38, 22, 2, 73
LOAD, EQUAL, RETURN, ALLOW, FAIL = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
program = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (LOAD, 0, 0, 0), (EQUAL, 0, 1, FLOCK), (RETURN, 0, 0, FAIL | int(sys.argv[1])),
        (RETURN, 0, 0, ALLOW),
    )
)
code = ctypes.create_string_buffer(program)
rules = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
if libc.prctl(PR_SET_SECCOMP, FILTER, rules, 0, 0):
    sys.exit(77)
"""

USERS = """
import os
from pathlib import Path
from mpiddl.data.moving.shared_files import SharedFile, map_shared, remove_unused
from mpiddl.devices.cuda_aware.verdict import _one_at_a_time
from mpiddl.observe.event_files import EventFile, in_use

with _one_at_a_time():
    pass
folder = Path(sys.argv[2])
EventFile(folder / "rank-0.events")
assert not in_use(folder / "rank-0.events")
made = SharedFile.create(folder, 100)
joined = SharedFile.join(made.path)
remove_unused(folder)
joined.close()
assert len(map_shared(made.path, 100)) == 100  # somebody may need it still
made.close()
assert not made.path.exists()
print("right")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of flock is another")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, number):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_FLOCK + USERS), str(number), str(tmp_path)],
        capture_output=True,
        text=True,
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": ""},
    )
    if done.returncode == 77:
        pytest.skip("no seccomp")
    assert done.stdout == "right\n", done.stderr
    assert done.stderr.count("has no file locks") == 1, done.stderr
