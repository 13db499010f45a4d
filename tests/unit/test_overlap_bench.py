"""The overlap benchmark's models, statistics and judgement."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

from mpiddl.bench import models, overlap_candidates
from mpiddl.bench.models import DEFAULTS, ModelSpec, batches, build, loss_of, nbytes_of
from mpiddl.bench.overlap import Row, deviations, distances_of, median_and_interval
from mpiddl.bench.overlap_candidates import Others, expanded
from mpiddl.bench.overlap_report import HEADINGS, describe_model, line_of, problems, ratios
from mpiddl.bench.plots import plot_overlap
from mpiddl.bench.steps import Training, Way, fingerprint, sgd
from mpiddl.errors import PeerError

SMALL = [
    ModelSpec("mlp", width=8, layers=3, batch=4),
    ModelSpec("cnn", width=2, layers=7, batch=2),  # more stages than the image can be halved
    ModelSpec("transformer", width=10, layers=2, batch=2, context=5),
]


def row(candidate="mpiddl/inline", model="mlp", exposed=0.010, deviation=0.0):
    return Row(
        model=model,
        candidate=candidate,
        ranks=2,
        seconds=0.120,
        exposed=exposed,
        exposed_low=exposed - 0.001,
        exposed_high=exposed + 0.002,
        hidden=0.75,
        samples_per_second=1066.7,
        cpu=0.119,
        system=0.003,
        beside=0.001,
        deviation=deviation,
        agrees_with="after",
        rounds=[0.119, 0.120, 0.130],
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mlp", 6 * (2048 * 2048 + 2048)),
        (
            "cnn",
            sum(9 * a * b + b for a, b in [(3, 64), (64, 64), (64, 128), (128, 128)])
            + sum(9 * a * b + b for a, b in [(128, 256), (256, 256)])
            + (256 * 4 * 4 * 512 + 512)
            + (512 * 10 + 10),
        ),
        (
            "transformer",
            512 * 256  # tokens
            + 64 * 256  # places
            + 4 * (4 * (256 * 256 + 256) + 2 * 4 * 256 * 256 + 4 * 256 + 256 + 4 * 256)
            + (256 * 512 + 512),
        ),
        (
            "transformer-large",
            512 * 768  # tokens
            + 256 * 768  # places
            + 14 * (4 * (768 * 768 + 768) + 2 * 4 * 768 * 768 + 4 * 768 + 768 + 4 * 768)
            + (768 * 512 + 512),
        ),
    ],
)
def test_models_have_the_announced_sizes(name, parameters):
    facts = describe_model(DEFAULTS[name])

    assert facts["parameters"] == parameters
    assert facts["gradient_bytes"] == 4 * parameters


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_every_parameter_takes_part(spec):
    model = build(spec)
    inputs, targets = batches(spec, rank=0, count=1)[0]
    loss_of(spec, model(inputs), targets).backward()

    assert nbytes_of(spec) == sum(parameter.nbytes for parameter in model.parameters())
    assert len(inputs) == spec.batch
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(parameter.grad.any() for parameter in model.parameters())


def test_a_model_that_torch_cannot_count_is_large():
    assert nbytes_of(ModelSpec("cnn", width=1 << 20, layers=900, batch=1)) > 1 << 60


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_the_same_model_everywhere_and_data_of_each_rank(spec):
    torch.manual_seed(5)  # whatever came before
    here = [parameter.clone() for parameter in build(spec).parameters()]
    torch.manual_seed(6)
    assert all(map(torch.equal, here, build(spec).parameters()))
    mine, again, others = batches(spec, 0, 2), batches(spec, 0, 3), batches(spec, 1, 2)
    for pair, same, other in zip(mine, again, others, strict=False):
        assert all(map(torch.equal, pair, same))
        assert not torch.equal(pair[0], other[0])
    assert not torch.equal(mine[0][0], mine[1][0])


def test_the_transformer_sees_no_token_to_come():
    spec = SMALL[2]
    model, (tokens, _) = build(spec), batches(spec, 0, 1)[0]
    later = tokens.clone()
    later[:, 3:] = 0
    before, after = (model(each).view(spec.batch, spec.context, -1) for each in (tokens, later))

    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])


def test_a_block_has_one_step_more_than_counts_and_then_settles():
    called = []

    class Optimizer:
        def zero_grad(self):
            called.append("zero_grad")

        def step(self):
            called.append("step")

    way = Way(torch.nn.Identity(), Optimizer())
    way.exchange = lambda: called.append("exchange")
    way.settle = lambda: called.append("settle")

    def make_way(model):
        way.model = model
        return way

    training = Training(SMALL[0], 0, make_way, lambda: called.append("barrier"))
    cost = training.run(2)

    assert called == ["barrier", *["zero_grad", "exchange", "step"] * 3, "settle"]
    assert cost.wall > 0
    assert cost.cpu >= cost.system >= 0


def test_training_changes_are_those_of_a_plain_loop():
    spec = SMALL[0]
    model = build(spec)
    before = fingerprint(model.parameters())
    optimizer = sgd(model)
    for inputs, targets in batches(spec, 3, 3):
        optimizer.zero_grad()
        loss_of(spec, model(inputs), targets).backward()
        optimizer.step()
    expected = fingerprint(model.parameters()) - before

    training = Training(spec, 3, lambda model: Way(model, sgd(model)), lambda: None)
    training.run(2)

    assert expected.norm() > 0
    assert training.changes() == expected.tolist()


def test_freed_memory_is_used_again():
    """Without ``keep_memory`` this takes some 12,000 page faults a round."""
    code = """
import resource, torch
from mpiddl.bench.steps import keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_memory()
for turn in range(20):  # the heap takes a few to find its shape
    before = faults()
    blocks = [torch.ones(4 << 20) for _ in range(3)]
    del blocks
print(faults() - before)
"""
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert int(job.stdout) < 100


def test_a_fingerprint_is_linear_as_long_as_what_it_is_of_and_sees_every_element():
    random = torch.Generator().manual_seed(1)
    one, other = (
        [least + torch.rand(shape, generator=random) for shape in ((300, 200), (7,), (1024, 3))]
        for least in (1, 0)
    )
    difference = [a.double() - b.double() for a, b in zip(one, other, strict=True)]
    length = float(torch.cat([part.flatten() for part in difference]).norm())

    assert torch.allclose(fingerprint(one) - fingerprint(other), fingerprint(difference))
    assert float(fingerprint(difference).norm()) == pytest.approx(length, rel=0.1)
    for tensor, place in ((0, 0), (0, -1), (1, 3), (2, 3071)):
        changed = [part.clone() for part in one]
        changed[tensor].view(-1)[place] += 1e-3
        moved = float((fingerprint(changed) - fingerprint(one)).norm())
        assert moved == pytest.approx(1e-3, rel=1e-2)


def test_the_interval_holds_the_median_and_shrinks():
    random = numpy.random.default_rng(0)
    few, many = random.normal(5.0, 1.0, 9), random.normal(5.0, 1.0, 400)
    for values in (few, many):
        middle, low, high = median_and_interval(values)
        assert low <= middle == numpy.median(values) <= high
        assert low < 5.0 < high
    assert high - low < 0.4
    assert median_and_interval(numpy.array([3.0])) == (3.0, 3.0, 3.0)


def test_nine_of_ten_intervals_hold_the_truth():
    random = numpy.random.default_rng(1)
    intervals = [median_and_interval(random.normal(0.0, 1.0, 25)) for _ in range(200)]

    assert 0.8 < sum(low <= 0 <= high for _, low, high in intervals) / 200 <= 0.97


@pytest.mark.parametrize("odd", range(4))
def test_who_is_alone_is_far_from_the_others(odd):
    changes = numpy.tile(numpy.arange(8.0), (4, 1)) + 1e-7 * numpy.eye(4, 8)
    changes[odd] *= 1.5
    medoid, far = deviations(distances_of(changes))

    assert medoid != odd
    assert far[odd] == pytest.approx(0.5, rel=1e-3)
    assert max(away for place, away in enumerate(far) if place != odd) < 1e-6


@pytest.mark.parametrize("candidates", [2, 3, 4, 5])
def test_no_difference_passes_whoever_is_right(candidates):
    for wrong in range(1, candidates):
        changes = numpy.ones((candidates, 8))
        changes[:wrong] *= 2
        assert max(deviations(distances_of(changes))[1]) > 0.3


@pytest.mark.parametrize("value", [0.0, numpy.nan, numpy.inf])
def test_nobody_agrees_where_nothing_is_learned(value):
    far = deviations(distances_of(numpy.full((3, 8), value)))[1]

    assert all(numpy.isinf(far))


def test_who_computes_something_else_is_named():
    rows = [row("none", deviation=None), row("ddp", deviation=2e-6)]
    rows += [row(deviation=0.02), row("next/inline", deviation=numpy.inf)]

    assert problems(rows) == [
        f"mlp: parameters of {name} differ from those of after by {far} of what training changed"
        for name, far in (("mpiddl/inline", "2.0e-02"), ("next/inline", "inf"))
    ]


def test_ratios_to_ddp_for_each_model_and_together():
    rows = [row("none", exposed=0.0), row(exposed=0.010), row("ddp", exposed=0.040)]
    rows += [dataclasses.replace(each, model="cnn", exposed=2 * each.exposed) for each in rows[:2]]
    rows.append(row("ddp", "cnn", exposed=0.060))

    assert ratios(rows) == [
        "exposed by mpiddl/inline / by ddp: mlp 0.25, cnn 0.33, together 0.30",
    ]
    assert ratios(rows[:2]) == []


def test_ratios_to_ddp_on_nccl_where_it_ran():
    rows = [row("none", exposed=0.0), row(exposed=0.010), row("ddp", exposed=0.040)]
    rows.append(row("ddp/nccl", exposed=0.005))

    assert ratios(rows) == [
        "exposed by mpiddl/inline / by ddp: mlp 0.25",
        "exposed by mpiddl/inline / by ddp/nccl: mlp 2.00",
    ]


@pytest.mark.parametrize(("sharers", "words"), [(0, "have none"), (2, "up to 2 ranks share one")])
def test_nccl_wants_a_gpu_for_each_rank(sharers, words):
    with pytest.raises(PeerError, match=words):
        Others(SimpleNamespace(gpu_sharers=sharers)).find("nccl")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_usual_is_known(kind):
    assert set(models.USUAL[kind].split(",")) <= set(DEFAULTS)
    assert set(overlap_candidates.USUAL[kind].split(",")) <= set(overlap_candidates.NAMES)


def test_engines_are_candidates_of_their_own():
    assert expanded(["mpiddl", "ddp", "next"], ["inline", "thread"]) == [
        *("none", "after", "mpiddl/inline", "mpiddl/thread", "ddp", "next/inline", "next/thread")
    ]


def test_the_table_is_aligned():
    text = line_of(row())

    expected = "mpiddl/inline 120.0 10.0 9.0 to 12.0 75% 1,066.7 119.0 3.0 1.0 0e+00"
    assert " ".join(text.split()) == expected
    assert len(text) == len(HEADINGS)
    assert line_of(row("none")).split()[2:4] == ["-", "-"]


def test_a_plot_has_every_candidate(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(name, model) for model in ("mlp", "cnn") for name in ("none", "after", "ddp")]
    plot_overlap(tmp_path / "a.svg", rows, "two ranks")

    drawn = (tmp_path / "a.svg").read_text()
    for text in ("after", "ddp", "mlp: 120 ms without exchange", "two ranks"):
        assert f"<!-- {text} -->" in drawn, text
