"""mpiddl on several hosts."""

from __future__ import annotations

import json
import os

import pytest

from mpiddl.observe.event_files import read

RANKS = "tests/ranks"
FEW = [f"{RANKS}/test_{name}.py" for name in ("every_collective", "all_reduce", "disturbed")]
MORE = [f"{RANKS}/test_{name}.py" for name in ("data_parallel", "engine", "many_at_once")]


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["--hosts", "3"], FEW),
        (["--hosts", "2", "--ranks-per-host", "2"], FEW[:2]),
        (["--hosts", "2", "--ranks-per-host", "2", "--placement", "cyclic"], FEW[:1] + MORE),
    ],
    ids=lambda value: " ".join(value) if "tests" not in value[0] else "",
)
def test_what_holds_on_one_node_holds_on_several(lab, options, files):
    job = lab(options, "python", "-m", "pytest", "-q", *files, "-m", "not thorough")

    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-1000:]
    assert " passed" in job.stdout


def test_lost_packets_cost_time_only(lab):
    code = """
import mpiddl, torch
world = mpiddl.init()
tensor = torch.arange(300_000, dtype=torch.float64) + world.rank
mpiddl.all_reduce(tensor)
assert bool((tensor == 2 * torch.arange(300_000, dtype=torch.float64) + 1).all())
print("right", flush=True)
"""
    job = lab(["--loss", "2"], "python", "-c", code)

    assert job.returncode == 0, job.stderr
    assert job.stdout.count("right") == 2


def test_training_is_the_same_on_any_hosts(lab, tmp_path):
    """Bitwise: the ring's sums do not depend on where its two ranks are."""
    metrics = []
    for options in (["--hosts", "2"], ["--hosts", "1", "--ranks-per-host", "2"]):
        out = tmp_path / f"out{len(metrics)}"
        flags = ["--epochs", "1", "--algorithm", "ring", "--out", str(out)]
        # A rank alone on its host would have the threads of all its cores, and their sums.
        job = lab(options, "python", "jobs/digits.py", *flags, env={"OMP_NUM_THREADS": "1"})
        assert job.returncode == 0, job.stderr
        lines = (out / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])

    assert metrics[0]
    assert metrics[0] == metrics[1]


def test_doctor_sees_hosts_and_names_what_was_set(lab):
    doctor = ["python", "-m", "mpiddl", "doctor"]
    job = lab(["--ranks-per-host", "2"], *doctor)

    assert job.returncode == 0, job.stdout
    assert "4 on 2 node(s)" in job.stdout
    if os.environ.get("MPI", "openmpi") == "openmpi":
        assert "OMPI_MCA_btl_tcp_eager_limit=540672" in job.stdout
        small = lab([], *doctor, env={"OMPI_MCA_btl_tcp_eager_limit": "65536"})
        assert "less than a chunk (512KiB)" in " ".join(small.stdout.split())


def test_bench_and_its_peer_across_hosts(lab, tmp_path):
    flags = ["--sizes", "1MiB", "--repeats", "2", "--algorithms", "all", "--json"]
    file = tmp_path / "out.json"
    job = lab(
        ["--ranks-per-host", "2"], "python", "-m", "mpiddl", "bench", "all-reduce", *flags, file
    )

    assert job.returncode == 0, job.stdout + job.stderr
    report = json.loads(file.read_text())
    seen = {row["algorithm"] for row in report["rows"]}
    names = {"auto", "hierarchical", "ring", "direct", "doubling", "library", "reference", "gloo"}
    assert seen == names
    assert all(row["wrong"] == 0 for row in report["rows"])
    assert report["environment"]["hosts"] == ["host1", "host2"]
    assert "algorithm 'shared' works within one node" in job.stdout


def test_a_rank_stuck_on_another_host(lab):
    code = """
import time, mpiddl
world = mpiddl.init()
if world.rank == 1:
    time.sleep(1000)
mpiddl.barrier()
"""
    job = lab(["--hosts", "2"], "python", "-c", code, env={"MPIDDL_TIMEOUT": "1"})

    assert job.returncode != 0
    assert "rank 0 of 2 on host1 has waited for 3" in job.stderr, job.stdout + job.stderr
    assert "not seen from here: rank 1 on host2" in job.stderr


def test_clocks_of_hosts_are_aligned(lab, tmp_path):
    """The lab's hosts share a clock, so what was measured is the error."""
    init = ["python", "-c", "import mpiddl; mpiddl.init()"]
    job = lab(["--hosts", "3"], *init, env={"MPIDDL_TRACE": str(tmp_path)})
    assert job.returncode == 0, job.stderr

    clocks = [read(path).about["clock"] for path in sorted(tmp_path.glob("*.events"))]
    assert clocks[0] == {"offset": 0, "error": 0}
    for clock in clocks[1:]:
        assert 0 < clock["error"] < 100_000_000
        assert abs(clock["offset"]) <= clock["error"]
