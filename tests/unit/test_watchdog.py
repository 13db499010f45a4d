"""What the watchdog asks of a rank that works."""

from __future__ import annotations

import linecache

from mpiddl.observe.watchdog_report import summary


def test_a_rank_is_asked_every_second_and_no_file_with_it(monkeypatch):
    """Every rank of a job would look for every source file of its stack in a shared home."""
    asked = []
    for name in ("checkcache", "getlines"):  # which look for files
        call = getattr(linecache, name)
        monkeypatch.setattr(linecache, name, lambda *a, c=call: (asked.append(a), c(*a))[1])
    said = summary([])
    assert asked == []
    assert "test_watchdog.py" in said
    assert "in test_a_rank_is_asked" in said
