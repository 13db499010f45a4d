"""What is left in shared memory of ranks that were killed."""

from __future__ import annotations

import os

from mpiddl.comm.windows import PREFIX, remove_stale


def test_names_that_killed_ranks_have_left_are_removed(tmp_path):
    old, new, data = (tmp_path / f"{name}1" for name in (PREFIX, f"{PREFIX}new", "mpiddl-data-"))
    for path in (old, new, data):
        path.touch()
    for path in (old, data):
        os.utime(path, (0, 0))
    remove_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([new, data])
