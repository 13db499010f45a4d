"""``mpiddl tune`` on real ranks, and ``auto`` that goes by it."""

from __future__ import annotations

import json

import pytest

USED = """
    import mpiddl
    import torch
    from mpiddl.collectives.choose import choose
    world = mpiddl.init()
    names = [choose("auto", torch.float32, nbytes, world) for nbytes in (1024, 1 << 20)]
    tensor = mpiddl.all_reduce(torch.ones(1000))
    assert bool((tensor == world.size).all())
    print([(each.algorithm.run.__name__, each.chunk_bytes) for each in names], flush=True)
"""


def test_auto_goes_by_what_was_measured(start, tmp_path):
    file = tmp_path / "tune.json"
    setting = {"MPIDDL_TUNE": str(file)}
    tune = ["python", "-m", "mpiddl", "tune", "--sizes", "1KiB,64KiB", "--repeats", "2"]
    job = start(2, tune, env=setting)

    assert job.status == 0, job.both
    assert f"written to {file}" in job.out
    ((cluster, entry),) = json.loads(file.read_text())["clusters"].items()
    assert cluster.endswith(", 1x2 ranks, cpu")
    assert f"# {cluster}" in job.out
    assert "shared" in job.out
    assert "ring" in job.out

    entry["choices"] = [
        {"up_to": 1024, "algorithm": "direct", "chunk_bytes": 4096},
        {"up_to": None, "algorithm": "ring", "chunk_bytes": 8192},
    ]
    file.write_text(json.dumps({"mpiddl_tune": 1, "clusters": {cluster: entry}}))
    used = start(2, USED, env=setting)
    assert used.status == 0, used.both
    assert used.out.splitlines() == ["[('direct_all_reduce', 4096), ('ring_all_reduce', 8192)]"] * 2
    other = start(3, USED, env=setting)
    assert other.status == 0, other.both
    assert "ring" not in other.out


@pytest.mark.by_day(0)
def test_rank_0s_table_counts_for_all_and_a_corrupt_one_is_ignored(start, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    script = tmp_path / "use.sh"
    script.write_text(
        'test "${OMPI_COMM_WORLD_RANK:-${PMI_RANK}}" = 0 || export MPIDDL_TUNE=/not/there\n'
        'exec "$@"\n'
    )
    (tmp_path / "used.py").write_text("\n".join(line[4:] for line in USED.splitlines()))
    job = start(
        2,
        ["sh", str(script), "python", str(tmp_path / "used.py")],
        env={"MPIDDL_TUNE": str(tmp_path / "broken.json")},
    )

    assert job.status == 0, job.both
    assert job.out.count("shared_all_reduce") == 4
    assert job.err.count("broken.json is ignored") == 1
    assert "/not/there" not in job.err


@pytest.mark.by_day(0)
def test_a_file_that_cannot_be_written_is_one_error(start):
    flags = ["--sizes", "8", "--repeats", "1", "--file", "/proc/none"]
    job = start(2, ["python", "-m", "mpiddl", "tune", *flags])

    assert job.status == 2
    assert job.both.count("/proc/none cannot be written") == 1
    assert "Traceback" not in job.both
