"""The benchmark's arithmetic, its check of results, and what it writes."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from mpiddl.base.units import parse_sizes
from mpiddl.bench.bandwidth import Row, busbw_factor
from mpiddl.bench.gpu_memory import gpu_busbw_limit
from mpiddl.bench.memory import busbw_limit
from mpiddl.bench.patterns import COLLECTIVES, count_wrong, fill, lengths
from mpiddl.bench.plots import plot_bandwidth
from mpiddl.bench.report import HEADINGS, line_of, memory_lines, write_csv, write_json

MIB = 1 << 20


def row(algorithm="auto", placement="plain", nbytes=MIB, gbps=4.0, wrong=0, staging=None):
    seconds = nbytes / gbps / 1e9
    return Row(
        collective="all-reduce",
        algorithm=algorithm,
        placement=placement,
        nbytes=nbytes,
        dtype="float32",
        op="sum",
        ranks=2,
        seconds=seconds,
        seconds_p99=2 * seconds,
        algbw=gbps,
        busbw=gbps,
        wrong=wrong,
        staging=staging,
    )


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1KiB", [1024]),
        ("1KiB:64KiB", [1 << 10, 1 << 12, 1 << 14, 1 << 16]),
        ("1KiB:100KiB", [1 << 10, 1 << 12, 1 << 14, 1 << 16, 100 << 10]),
        ("4MiB,1MiB", [4 * MIB, MIB]),
        ("100,1KB", [100, 1000]),
    ],
)
def test_sizes(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "big", "0:1KiB", "2KiB:1KiB", "1:2:3", "1KiB,"])
def test_sizes_that_cannot_be(text):
    with pytest.raises(ValueError, match="size|small"):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("collective", "factor"),
    [
        ("all-reduce", 1.5),
        ("reduce-scatter", 0.75),
        ("all-gather", 0.75),
        ("broadcast", 1),
        ("all-to-all", 0.75),
    ],
)
def test_bandwidths_are_those_of_nccl_tests(collective, factor):
    assert busbw_factor(collective, 4) == factor


def test_memory_limit_of_an_all_reduce():
    """Every rank's buffer is read once and written once: 2n of it, at busbw = 2(n-1)/n of it."""
    for n in (2, 3, 4, 8):
        seconds_per_byte = 2 * n / 120e9
        assert busbw_limit(120.0, n) == pytest.approx(2 * (n - 1) / n / seconds_per_byte / 1e9)


GPU_MEMORY = {"stream_gbps": 100.0, "copy_gbps": 3000.0, "peer_gbps": 200.0, "pcie_gbps": 25.0}


@pytest.mark.parametrize(
    ("sharers", "peer_gbps", "limit"),
    [
        (4, 200.0, 3000 * 3 / 16),  # one GPU: its memory alone
        (1, 200.0, 200.0),  # one each: the links
        (1, 5000.0, 3000 * 3 / 16),  # links that are faster than memory
        (2, 200.0, 3000 * 3 / 16),  # shared, but not by all: only memory is known to hold
        (1, None, 3000 * 3 / 16),  # not mapped
    ],
)
def test_limit_of_an_all_reduce_on_gpus(sharers, peer_gbps, limit):
    memory = GPU_MEMORY | {"peer_gbps": peer_gbps}

    assert gpu_busbw_limit(memory, 4, sharers) == pytest.approx(limit)


def test_memory_is_told():
    assert memory_lines({"stream_gbps": 100.0}).count("#") == 1
    told = memory_lines(GPU_MEMORY)
    for gbps in ("100.0", "3000.0", "200.0", "25.0"):
        assert f"{gbps} GB/s" in told
    assert "cannot be mapped" in memory_lines(GPU_MEMORY | {"peer_gbps": None})


def outputs(collective, op, dtype, ranks, length=30_000):
    """Each rank's right output, by an oracle that knows nothing of patterns' own."""
    before, after = lengths(collective, length, ranks)
    inputs = torch.zeros(ranks, before, dtype=dtype)
    for rank in range(ranks):
        fill(inputs[rank], rank, ranks, op)
    wide = inputs.double()
    reduced = {
        "sum": wide.sum(0),
        "mean": wide.mean(0),
        "min": wide.amin(0),
        "max": wide.amax(0),
        "prod": wide.prod(0),
    }[op]
    for rank in range(ranks):
        part = before // ranks
        own = slice(rank * part, (rank + 1) * part)
        result = {
            "all-reduce": lambda: reduced,
            "reduce-scatter": lambda own=own: reduced[own],
            "all-gather": lambda: inputs.flatten(),
            "broadcast": lambda: inputs[0],
            "all-to-all": lambda own=own: inputs[:, own].flatten(),
        }[collective]()
        assert len(result) == after
        yield result.to(dtype).clone()


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "prod"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_right_results_pass_and_wrong_ones_are_counted(collective, op, dtype, ranks):
    kind = getattr(torch, dtype)
    if op == "mean" and not kind.is_floating_point:
        return
    everyones = list(outputs(collective, op, kind, ranks))
    for rank, output in enumerate(everyones):
        assert count_wrong(output, collective, rank, ranks, op) == 0
    for place in (0, len(output) // 2, -1):
        output[place] += 1
    assert count_wrong(output, collective, ranks - 1, ranks, op) == 3


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_collective_that_did_nothing_is_wrong(collective):
    before, after = lengths(collective, 30_000, 3)
    for rank in range(3):
        own = torch.zeros(max(before, after))
        fill(own[:before], rank, 3, "sum")
        wrong = count_wrong(own[:after], collective, rank, 3, "sum")
        if not (collective == "broadcast" and rank == 0):
            assert wrong > after // 4


def test_parts_in_the_wrong_order_are_wrong():
    output = next(outputs("all-gather", "sum", torch.float32, 3))
    turned = torch.cat([output[10_000:], output[:10_000]])

    assert count_wrong(turned, "all-gather", 0, 3, "sum") > 10_000


@pytest.mark.parametrize("op", ["sum", "min", "max", "prod"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 15, 40])
def test_segments_in_the_wrong_place_are_wrong(op, ranks):
    output = next(outputs("all-reduce", op, torch.float32, ranks, length=1 << 14))

    assert count_wrong(output, "all-reduce", 0, ranks, op) == 0
    alike = op in ("min", "max") and ranks >= 5  # every value is somewhere
    assert alike or count_wrong(output.roll(1024), "all-reduce", 0, ranks, op) > 1000


@pytest.mark.parametrize("ranks", [2, 40, 60])
def test_sums_are_exact_however_many_ranks(ranks):
    total = torch.zeros(1000, dtype=torch.int64)
    part = torch.zeros(1000, dtype=torch.int64)
    for rank in range(ranks):
        fill(part, rank, ranks, "sum")
        total += part
    for dtype in (torch.int8, torch.bfloat16):
        assert torch.equal(total, total.to(dtype).long())
    assert total.max() > 0


def test_a_report_as_json_and_csv(tmp_path):
    rows = [row(), row("library", wrong=None)]
    write_json(tmp_path / "a.json", {"ranks": []}, rows, {"stream_gbps": 100.0})
    write_csv(tmp_path / "a.csv", rows)

    read = json.loads((tmp_path / "a.json").read_text())
    assert set(read) == {"environment", "rows", "memory"}
    names = (
        "collective algorithm nbytes dtype op ranks seconds seconds_p99 algbw busbw wrong staging"
    )
    assert set(names.split()) <= set(read["rows"][0])
    with (tmp_path / "a.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [each["algorithm"] for each in lines] == ["auto", "library"]
    assert float(lines[0]["busbw"]) == 4.0


def test_the_table_is_aligned():
    text = line_of(row(nbytes=256 * MIB, wrong=None), 25.0)

    expected = "256MiB 67108864 float32 sum auto plain 67108.9 134217.7 4.00 4.00 - 25.0"
    assert " ".join(text.split()) == expected
    for name in ("size", "count", "time(us)", "p99(us)", "algbw", "busbw", "#wrong", "limit"):
        end = HEADINGS.index(name) + len(name)
        assert text[end - 1] != " ", name
        assert text[end : end + 1] in (" ", ""), name


def test_staging_stands_beside_the_memory():
    lines = [line_of(row(staging=way), None).split() for way in (None, "device", "host")]

    assert [line[5] for line in lines] == ["plain", "plain/device", "plain/host"]
    assert len({len(line_of(row(staging=way), None)) for way in (None, "device")}) == 1


def test_slow_networks_keep_their_digits():
    assert line_of(row(gbps=0.02345), None).split()[-3] == "0.0234"
    assert line_of(row(gbps=12.345), None).split()[-3] == "12.35"


def test_a_plot_has_every_algorithm(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row(algorithm, placement, nbytes, gbps, staging=staging)
        for algorithm, placement, gbps, staging in [
            ("auto", "empty", 9, None),
            ("library", "plain", 3, None),
            ("ring", "plain", 2, "device"),
            ("ring", "plain", 1, "host"),
        ]
        for nbytes in (1024, 4096, MIB)
    ]
    plot_bandwidth(tmp_path / "a.svg", rows, 25.0, "all-reduce")

    drawn = (tmp_path / "a.svg").read_text()
    lines = ["auto, mpiddl.empty", "library, plain tensor", "memory limit", "4KiB"]
    lines += [f"ring, plain tensor, staging {way}" for way in ("device", "host")]
    for text in lines:
        assert f"<!-- {text} -->" in drawn, text
