"""Traces of whole jobs, and what is left of a killed one."""

from __future__ import annotations

import json
import os
import re

import pytest

from mpiddl.trace import chrome as trace

TRAIN = """
    import os, signal, torch, mpiddl
    world = mpiddl.init()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(300, 300) for _ in range(3)]
    model = mpiddl.DataParallel(torch.nn.Sequential(*layers), bucket_size="512KiB")
    mpiddl.barrier()
    for step in range(5):
        if step == 3 and world.rank == world.size - 1:
            {action}
        model(torch.ones(2, 300)).sum().backward()
    print("trained", flush=True)
"""
TRACE = ["python", "-m", "mpiddl", "trace"]


def test_trace_merge_and_plot(start, tmp_path):
    folder = tmp_path / "traces"
    env = {"MPIDDL_TRACE": str(folder), "MPIDDL_ALGORITHM": "ring"}
    folder.mkdir()
    (folder / "rank-7.events").write_text("of an earlier run with more ranks")
    job = start(2, TRAIN.format(action="pass"), env=env)
    assert (job.status, job.err) == (0, ""), job.both

    run, picture = tmp_path / "run.json", tmp_path / "run.png"
    merged = start(None, [*TRACE, "merge", str(folder), "-o", str(run)])
    assert (merged.status, merged.err) == (0, ""), merged.both
    events = json.loads(run.read_text())["traceEvents"]
    waits = 0
    for rank in (0, 1):
        mine = [event for event in events if event["pid"] == rank]
        spans = [event["name"] for event in mine if event["ph"] == "X"]
        assert [spans.count(name) for name in ("forward", "backward")] == [5, 5]
        waits += spans.count("wait")
        assert spans.count("in flight") == 5 * 3
        chunks = [event["args"]["bytes"] for event in mine if event["name"] == "chunk"]
        assert sum(chunks) >= 5 * 3 * 300 * 301 * 4  # a ring of two sends every byte once
        assert sum(event["name"].startswith("got the gradient") for event in mine) == 5 * 6
    assert 0 < waits <= 2 * 5 * 3  # the later rank of a bucket may find it complete
    assert trace.read_trace(folder) == trace.read_trace(run)  # `plot` takes either
    plotted = start(None, [*TRACE, "plot", str(run), "-o", str(picture), "--step", "2:3"])
    assert (plotted.status, plotted.err) == (0, ""), plotted.both
    assert picture.stat().st_size > 10_000

    for flags, words in [
        (["-o", str(tmp_path / "small")], "small cannot be drawn: its name must end in .png"),
        (["--step", "1:300000000"], "the trace has no step 6; it has 1 to 5"),
    ]:
        refused = start(None, [*TRACE, "plot", str(run), *flags])
        assert (refused.status, refused.out) == (2, "")
        assert words in refused.err
    foreign = start(None, [*TRACE, "merge", str(tmp_path)])
    assert (foreign.status, foreign.out) == (2, "")
    assert "holds no recording" in foreign.err


def test_a_killed_rank_leaves_its_last_events(start, tmp_path):
    job = start(
        2,
        TRAIN.format(action="os.kill(os.getpid(), signal.SIGKILL)"),
        env={"TMPDIR": str(tmp_path)},
    )
    assert job.status != 0
    (folder,) = tmp_path.glob(f"mpiddl-{os.getuid()}/*")

    shown = start(None, [*TRACE, "show", str(folder)])

    assert shown.status == 0, shown.both
    assert re.search(r"rank 1 of 2 on \S+: \d+ events", shown.out)
    last = shown.out.rstrip().splitlines()[-1]
    assert last.strip() == "last  ended backward 3"
    # Nobody reads on: no traceback.
    piped = start(None, ["sh", "-c", '"$0" "$@" | true', *TRACE, "show", str(folder)])
    assert (piped.out, piped.err) == ("", "")


def test_a_failure_names_the_flight_recorder(start, tmp_path):
    env = {"TMPDIR": str(tmp_path)}
    job = start(2, TRAIN.format(action="raise ValueError('the cause')"), env=env)

    folder = re.search(r"what each rank did last: mpiddl trace show (\S+)", job.err).group(1)
    assert sorted(os.listdir(folder)) == ["rank-0.events", "rank-1.events"]


@pytest.mark.by_day(0)
def test_a_good_end_leaves_nothing(start, tmp_path):
    for ranks in (1, 2):
        job = start(ranks, TRAIN.format(action="pass"), env={"TMPDIR": str(tmp_path)})
        assert job.status == 0, job.both
    assert list(tmp_path.glob("mpiddl-*/*")) == []


@pytest.mark.by_day(0)
def test_a_folder_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").write_text("")
    job = start(2, "import mpiddl; mpiddl.init()", env={"MPIDDL_TRACE": str(tmp_path / "file")})
    assert job.status != 0
    assert "no trace can be written into" in job.err

    (tmp_path / f"mpiddl-{os.getuid()}").write_text("not a folder")
    job = start(2, TRAIN.format(action="pass"), env={"TMPDIR": str(tmp_path)})
    assert job.status == 0, job.both
    assert "events are kept in memory only" in job.err
