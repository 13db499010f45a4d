"""Scripts that judge nodes."""

from __future__ import annotations

from batch import call

RANKS = ["--ntasks-per-node=1"]
QUICK = ["--repeats", 2, "--warmup", 1]


def test_doctor_looks_at_all_nodes(run):
    output = run("doctor", RANKS)

    assert "2 on 2 node(s)" in output, output
    assert "ready to train" in output
    if " 22.05." in call("sinfo", "--version"):
        assert "export SLURM_PMIX_FENCE=ring before srun" in output


def test_bandwidth_is_enough(run):
    output = run("bandwidth", RANKS, QUICK, env={"MIN_BUSBW": "0.001", "SIZES": "64KiB,1MiB"})

    assert "1MiB" in output, output
    assert "auto" in output
    assert "FAILED" not in output


def test_bandwidth_is_not_enough(submit):
    job = submit("bandwidth", RANKS, QUICK, env={"MIN_BUSBW": "100000", "SIZES": "1MiB"})

    assert job.until_over() == "FAILED"
    assert "is below 100000.0 GB/s" in job.output
