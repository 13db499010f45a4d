"""``mpiddl bench`` on real ranks: what it writes, and how it fails."""

from __future__ import annotations

import csv
import json
import subprocess
import time

import psutil
import pytest
from conftest import HANGS, MPIRUN, TOP

BENCH = ["python", "-m", "mpiddl", "bench"]
WITH_STATUS = '"$0" "$@"; echo "status $?"'


def with_status(*arguments):
    """A program that prints the status of each rank, and leaves with 0 itself."""
    return ["sh", "-c", WITH_STATUS, *BENCH, *arguments]


def test_a_run_writes_table_json_csv_and_plot_and_can_be_too_slow(start, tmp_path):
    files = [f"--{kind}={tmp_path}/out.{end}" for kind, end in FILES.items()]
    flags = ["--sizes", "1KiB,64KiB", "--repeats", "3", "--warmup", "1", "--min-busbw", "100000"]
    job = start(2, with_status("all-reduce", *flags, *files))

    assert job.out.count("status 1") == 2, job.both
    assert job.both.count("FAILED: auto, empty: busbw") == 1
    assert job.both.count("FAILED: auto, plain: busbw") == 1
    assert "below 100000.0 GB/s" in job.both
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report) == {"environment", "rows", "memory"}
    assert report["memory"]["stream_gbps"] > 0.1
    assert all(rank["cores"] for rank in report["environment"]["ranks"])
    seen = [(row["algorithm"], row["placement"], row["nbytes"]) for row in report["rows"]]
    lineup = [("auto", "empty"), ("auto", "plain"), ("library", "empty"), ("library", "plain")]
    lineup += [("gloo", "plain")]
    assert seen == [(*each, nbytes) for nbytes in (1024, 65536) for each in lineup]
    for row in report["rows"]:
        assert (row["wrong"], row["ranks"], row["op"]) == (0, 2, "sum")
        assert 0 < row["seconds"] <= row["seconds_p99"]
        assert row["busbw"] == pytest.approx(row["nbytes"] / row["seconds"] / 1e9)
    with (tmp_path / "out.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(seen)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


FILES = {"json": "json", "csv": "csv", "plot": "png"}


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("collective", "dtype"),
    [
        ("all-reduce", "bfloat16"),
        ("reduce-scatter", "float32"),
        ("all-gather", "bfloat16"),
        ("broadcast", "int8"),
        ("all-to-all", "bfloat16"),
    ],
)
def test_every_collective_and_algorithm_is_right(start, tmp_path, collective, dtype):
    flags = ["--sizes", "96,300KiB", "--repeats", "1", "--warmup", "0", "--fresh"]
    flags += ["--dtype", dtype, "--algorithms", "all"]
    job = start(3, [*BENCH, collective, *flags, "--json", str(tmp_path / "out.json")])

    assert job.status == 0, job.both
    assert "horovod beside rank 0: it is not installed" in job.out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["nbytes"] for row in rows} == {96, 300 << 10}
    assert all(row["wrong"] == 0 for row in rows)
    seen = {row["algorithm"] for row in rows}
    if collective == "all-reduce":
        # MPI's own cannot add bfloat16.
        assert seen == {
            *("auto", "shared", "hierarchical", "ring", "direct", "doubling", "reference", "gloo")
        }
        assert "library is left out: the MPI library has no sum of bfloat16" in job.out
    else:
        assert seen == {"auto", "library", "gloo"}


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["all-reduce", "--algorithms", "rung"], "no algorithm 'rung' for all-reduce"),
        (["broadcast", "--algorithms", "ring"], "no algorithm 'ring' for broadcast"),
        (["all-reduce", "--algorithms", "horovod"], "horovod beside rank 0: it is not installed"),
        (["all-reduce", "--json", "/nowhere/a.json"], "there is no folder /nowhere"),
        (["all-reduce", "--json", "/proc"], "/proc cannot be written: it is a folder"),
        (["all-reduce", "--plot", "a.foo"], "a.foo cannot be drawn: its name must end in .png"),
        (["all-reduce", "--plot", "a.png", "--json", "./a.png"], "a.png was given twice"),
        (["all-gather", "--device", "cuda:99"], "device 'cuda:99' does not exist: torch sees"),
        (["all-reduce", "--staging", "host"], "--staging is about GPU memory: add --device cuda"),
        (
            ["all-reduce", "--algorithms", "ring", "--min-busbw", "0.1"],
            "--min-busbw judges auto, which was not measured",
        ),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_said_once(start, arguments, words):
    job = start(2, with_status(*arguments, "--sizes", "1KiB"))

    assert job.both.count(words) == 1, job.both
    assert "status 0" not in job.out
    assert "Traceback" not in job.both


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["all-reduce", "--sizes", "4KiB:1KiB"], "from large to small"),
        (["all-reduce", "--dtype", "float8"], "none of"),
        (["all-reduce", "--op", "avg"], "none of"),
        (["all-reduce", "--repeats", "0"], "--repeats"),
        (["broadcast", "--device", "gpu"], "'gpu' is none of cpu, cuda, cuda:N"),
        (["all-reduce", "--staging", "device,disk"], "'disk' is none of device, host"),
        (["sum"], "No such command"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(start, arguments, words):
    job = start(2, with_status(*arguments))

    assert job.both.count("Usage:") == 1, job.both
    assert words in " ".join(job.both.split())
    assert job.out.count("status 2") == 2
    assert "Traceback" not in job.both


@pytest.mark.by_day(0)
def test_what_a_peer_cannot_do_is_left_out_once(start):
    job = start(2, [*BENCH, "all-reduce", "--op", "mean", "--sizes", "64,128", "--repeats", "1"])

    assert job.status == 0, job.both
    assert job.both.count("it has no mean") == 1
    assert job.out.count(" auto ") == 4


@pytest.mark.by_day(0)
def test_plain_messages_are_measured_by_name(start, tmp_path):
    flags = ["--sizes", "8,100,3MiB", "--repeats", "1", "--algorithms", "ring,sendrecv"]
    job = start(3, [*BENCH, "all-reduce", *flags, "--json", str(tmp_path / "out.json")])

    assert job.status == 0, job.both
    assert job.out.count("# sendrecv is no all-reduce") == 1
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 12
    assert {(row["algorithm"], row["wrong"]) for row in rows} == {("ring", 0), ("sendrecv", None)}


@pytest.mark.by_day(0)
def test_one_rank_alone(start):
    flags = ["--sizes", "1KiB", "--repeats", "1"]
    job = start(1, [*BENCH, "all-reduce", *flags, "--algorithms", "all"])

    assert job.status == 0, job.both
    assert job.out.count(" gloo ") == 1


@pytest.mark.by_day(0)
def test_a_full_disk_is_one_error(start):
    flags = ["--sizes", "1KiB", "--repeats", "1", "--algorithms", "auto", "--json", "/dev/full"]
    job = start(2, with_status("all-reduce", *flags))

    assert job.both.count("No space left on device") == 1, job.both
    assert job.out.count("status 2") == 2
    assert "Traceback" not in job.both


def test_a_killed_peer_is_one_error_and_no_hang():
    command = [MPIRUN, "-n", "2", *BENCH, "all-reduce", "--sizes", "1KiB,2KiB"]
    job = subprocess.Popen(
        [*command, "--repeats", "100000", "--algorithms", "auto,gloo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=TOP,
    )
    try:
        lines = iter(job.stdout.readline, "")
        assert any(line.split()[:1] == ["size"] for line in lines)
        peers = wait_until_timed(job)
        peers[-1].kill()
        rest = job.communicate(timeout=HANGS)[0]
    finally:
        job.kill()
        job.wait()

    assert job.returncode != 0, rest
    assert rest.count("gloo beside rank") == 1, rest
    assert "killed by SIGKILL" in rest
    assert "Traceback" not in rest
    assert not any(peer.is_running() for peer in peers)


def wait_until_timed(job):
    """Peers are stopped between orders: after host, join and prepare they are timed."""
    deadline, stops, stopped, peers = time.monotonic() + HANGS, 0, False, []
    while stops < 4:
        assert job.poll() is None
        assert time.monotonic() < deadline
        peers = peers if len(peers) == 2 else peers_of(job)
        before, stopped = stopped, bool(peers) and peers[0].status() == psutil.STATUS_STOPPED
        stops += stopped and not before
        time.sleep(0.002)  # polling
    return peers


def peers_of(job):
    """The other libraries' processes."""
    try:
        below = psutil.Process(job.pid).children(recursive=True)
        return [each for each in below if "mpiddl.bench.competitors.child" in each.cmdline()]
    except psutil.Error:
        return []
