"""``mpiddl bench overlap`` on real ranks: what it writes, and that wrong training is found."""

from __future__ import annotations

import json

import pytest

BENCH = ["python", "-m", "mpiddl", "bench", "overlap"]
SMALL = ["--width", "32", "--layers", "2", "--batch", "4", "--context", "8", "--engine", "auto"]
SMALL += ["--repeats", "2", "--warmup", "0", "--steps", "1", "--candidates", "mpiddl,ddp"]
LINEUP = ["none", "after", "mpiddl/auto", "ddp"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def test_a_run_writes_table_json_and_plot(start, tmp_path):
    """On three ranks, where libraries add in different orders."""
    files = [f"--json={tmp_path}/out.json", f"--plot={tmp_path}/out.png"]
    job = start(3, [*BENCH, *SMALL, *files], env=ONE_THREAD)

    assert job.status == 0, job.both
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report) == {"environment", "plan", "models", "rows"}
    assert all(rank["torch_threads"] == 1 for rank in report["environment"]["ranks"])
    assert report["plan"]["repeats"] == 2
    assert report["plan"]["device"] == "cpu"
    assert all(row["device"] == "cpu" for row in report["rows"])
    models = [model["name"] for model in report["models"]]
    assert models == ["mlp", "cnn", "transformer"]
    assert all(model["gradient_bytes"] == 4 * model["parameters"] > 0 for model in report["models"])
    seen = [(row["model"], row["candidate"]) for row in report["rows"]]
    assert seen == [(model, candidate) for model in models for candidate in LINEUP]
    for row in report["rows"]:
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) <= row["seconds"] <= max(row["rounds"])
        assert row["exposed_low"] <= row["exposed"] <= row["exposed_high"]
        assert row["samples_per_second"] == pytest.approx(12 / row["seconds"])
        assert row["cpu"] >= row["system"] >= 0
        if row["candidate"] == "none":
            assert (row["exposed"], row["hidden"], row["deviation"]) == (0, None, None)
        else:
            assert 0 <= row["deviation"] < 1e-5
    for row in report["rows"]:
        assert job.out.count(f"\n{row['candidate']} ") == 3
    assert "exposed by mpiddl/auto / by ddp: mlp" in job.out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


FORGETS = """
    import sys
    from mpiddl.cli.main import main
    from mpiddl.bench import overlap_candidates

    overlap_candidates.all_reduce = lambda buffer, op, world: buffer  # `after` exchanges nothing
    sys.argv = ["mpiddl", *{arguments!r}]
    main()
"""


def test_wrong_training_is_found_and_named(start):
    arguments = [*BENCH[3:], *SMALL, "--model", "mlp"]
    job = start(2, FORGETS.format(arguments=arguments), env=ONE_THREAD)

    assert job.status == 1, job.both
    assert job.both.count("FAILED") == 1
    assert "FAILED: mlp: parameters of after differ from those of mpiddl/auto by" in job.both
    assert "Traceback" not in job.both


@pytest.mark.by_day(0)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "rnn"], "'rnn' is none of mlp, cnn, transformer"),
        (["--bucket-size", "big"], "bucket-size"),
        (["--candidates", "horovod"], "horovod beside rank 0: it is not installed"),
        (["--candidates", "ddp/nccl"], "ddp/nccl needs a GPU for each rank, and these have none"),
        (["--device", "tpu"], "'tpu' is none of cpu, cuda"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_said_once(start, arguments, words):
    job = start(2, [*BENCH, *SMALL, *arguments])

    assert " ".join(job.both.split()).count(words) == 1, job.both
    assert job.status == 2
    assert "Traceback" not in job.both
