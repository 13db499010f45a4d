"""What users choose when they wrap a model."""

from __future__ import annotations

import pytest
import torch
from samples import seeded
from torch import nn

import mpiddl
from mpiddl.errors import GradientError, MismatchError, ReplicaError

FEATURES = 6


class Backwards(nn.Module):
    """Layers that are used in another order than they are defined, by rank if that is asked for."""

    def __init__(self, turn=False):
        super().__init__()
        torch.manual_seed(4)
        self.last = nn.Linear(8, 1)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.first = nn.Linear(FEATURES, 8)
        self.double()
        self.turn = turn

    def forward(self, inputs):
        hidden = self.first(inputs)
        branches = list(self.branches)[::-1] if self.turn else list(self.branches)
        return self.last(sum(branch(hidden).tanh() for branch in branches))


def loss_of(model, rank, step=0):
    generator = seeded(10 * step + rank)
    inputs = torch.randn(5, FEATURES, generator=generator, dtype=torch.float64)
    return model(inputs).square().mean()


def mean_gradients(size, step=0):
    """The oracle, without MPI."""
    model = Backwards()
    for rank in range(size):
        (loss_of(model, rank, step) / size).backward()
    return [parameter.grad for parameter in model.parameters()]


def problem(model, want):
    pairs = zip(model.named_parameters(), want, strict=True)
    wrong = [name for (name, p), grad in pairs if not torch.allclose(p.grad, grad, rtol=1e-11)]
    return ", ".join(wrong)


def buckets_of(model):
    names = [spec.name for spec in model.plan.parameters]
    return [[names[member] for member in bucket.members] for bucket in model.plan.buckets]


@pytest.mark.parametrize("rebuilds", [True, False])
def test_buckets_follow_the_observed_order(world, agree, rebuilds):
    model = mpiddl.DataParallel(Backwards(), bucket_size=600, rebuild_buckets=rebuilds)
    before = buckets_of(model)
    agree(before[0][0] == "first.bias", before)
    for step in range(3):
        if step % 2:
            model.zero_grad()  # else the next backward adds to what is in the old buckets
        loss_of(model, world.rank, step).backward()
        want = mean_gradients(world.size, step)
        if step == 2:
            both = zip(want, mean_gradients(world.size, 1), strict=True)
            want = [one + other for one, other in both]
        agree(not problem(model, want), f"step {step}: {problem(model, want)}")

    after = buckets_of(model)
    if rebuilds:
        agree("last.bias" in after[0] and "first.weight" in after[-1], after)
    else:
        agree(after == before, after)
    plans = mpiddl.gather_json(after, world=world)
    agree(all(plan == after for plan in plans), plans)


@pytest.mark.parametrize(
    "options",
    [*({"engine": name} for name in ("inline", "thread", "after")), {"algorithm": "library"}],
    ids=lambda options: next(iter(options.values())),
)
def test_opposite_ready_orders(world, agree, options):
    model = mpiddl.DataParallel(Backwards(turn=bool(world.rank % 2)), bucket_size=100, **options)
    for step in range(3):
        model.zero_grad()
        loss_of(model, world.rank, step).backward()
        agree(not problem(model, mean_gradients(world.size, step)), f"step {step}")

    orders = mpiddl.gather_json(model.strategy.scheduler.arrived, world=world)
    agree(world.size == 1 or orders[0] != orders[1], orders)
    branches = [[member for member in order if 2 <= member < 10 and member % 2] for order in orders]
    agree(world.size == 1 or branches[0] == branches[1][::-1], branches)


@pytest.mark.parametrize(
    "options",
    [
        {"bucket_size": "auto", "engine": "inline"},
        {"engine": "auto"},
        {"bucket_size": "auto", "engine": "auto"},
    ],
)
def test_what_is_measured_is_the_same_on_all_ranks(world, agree, options):
    model = mpiddl.DataParallel(Backwards(), **options)
    seen, wrong = set(), []
    for step in range(45):  # 2 to warm up, 4 with each of at most 9 choices
        model.zero_grad()
        loss_of(model, world.rank, step).backward()
        if step % 4 == 0:
            wrong.append(problem(model, mean_gradients(world.size, step)))
        reducer = model.strategy
        seen.add((reducer.reductions.threaded, reducer.scheduler._holds_back))

    agree(not any(wrong), wrong)
    measured = model.strategy.plans._calibration
    agree(len(measured._choices) == 1, measured._choices)
    choices = mpiddl.gather_json(measured.present, world=world)
    agree(all(choice == choices[0] for choice in choices), choices)
    agree((options["engine"] == "auto" and world.size > 1) == (len(seen) > 1), seen)


def spoil(model, value):
    """A gradient of ``value`` for the first branch's bias."""
    model.module.branches[0].bias.register_hook(lambda grad: torch.full_like(grad, value))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
def test_not_finite_gradients_end_in_an_error(world, agree, value, word):
    model = mpiddl.DataParallel(Backwards(), nan_check="error")
    loss_of(model, world.rank).backward()
    spoil(model, value)
    message = rf"rank {world.rank} on .*: the gradient of 'branches.0.bias' holds {word}"
    with pytest.raises(GradientError, match=message):
        loss_of(model, world.rank).backward()
    agree(True)


def test_not_finite_gradients_give_a_warning(world, agree, caplog):
    model = mpiddl.DataParallel(Backwards(), nan_check="warn")
    if world.rank == world.size - 1:
        spoil(model, float("nan"))
    with caplog.at_level("WARNING", logger="mpiddl"):
        loss_of(model, world.rank).backward()

    messages = [record.getMessage() for record in caplog.records]
    if world.rank == world.size - 1:
        agree(len(messages) == 1 and f"rank {world.rank}" in messages[0], messages)
    else:
        agree(messages == [], messages)
    agree(model.module.branches[0].bias.grad.isnan().all())


def test_a_replica_that_was_changed_is_found(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    model = mpiddl.DataParallel(Backwards(), check_replicas_every=2)
    loss_of(model, world.rank).backward()
    loss_of(model, world.rank).backward()
    last = world.size - 1
    if world.rank == last:
        with torch.no_grad():
            model.module.branches[2].weight[0, 0].nextafter_(torch.tensor(9.0).double())
    loss_of(model, world.rank).backward()  # the third: nobody looks
    with pytest.raises(ReplicaError, match=rf"'branches.2.weight' on rank {last}"):
        loss_of(model, world.rank).backward()
    agree(True)


def test_stats(world, agree):
    model = mpiddl.DataParallel(Backwards(), bucket_size=600, rebuild_buckets=False)
    for step in range(3):
        loss_of(model, world.rank, step).backward()

    stats = model.stats()
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    agree(stats.backwards == 3 and stats.reduced_bytes == 3 * nbytes, stats)
    agree([bucket.parameters for bucket in stats.buckets] == buckets_of(model), stats)
    agree(sum(bucket.nbytes for bucket in stats.buckets) == nbytes, stats)
    agree(all(bucket.exchanges == 3 for bucket in stats.buckets), stats)
    total = sum(bucket.in_flight_seconds for bucket in stats.buckets)
    agree(stats.communication_seconds == pytest.approx(total) and total > 0, stats)
    waited = sum(bucket.exposed_seconds for bucket in stats.buckets)
    agree(0 <= waited <= stats.exposed_seconds and stats.compute_seconds > 0, stats)

    before = model.stats()
    loss_of(model, world.rank).backward()
    agree(before == stats and model.stats().backwards == 4, "stats() hands out what changes")


def test_waits_in_the_next_forward_are_exposed(world, agree):
    model = mpiddl.DataParallel(Backwards(), bucket_size=600, rebuild_buckets=False)
    stepper = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    for step in range(5):
        if world.rank == world.size - 1:  # the others wait for it
            torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        loss_of(model, world.rank, step).backward()
        stepper.step()
    stepper.synchronize()

    stats = model.stats()
    waited = sum(bucket.exposed_seconds for bucket in stats.buckets)
    agree(0 <= waited <= stats.exposed_seconds, stats)


@pytest.mark.parametrize("option", [{"engine": "auto"}, {"find_unused_parameters": True}])
def test_options_that_differ_are_refused(world, agree, option):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    mine = {"engine": "inline", **(option if world.rank else {})}
    (name,) = option
    with pytest.raises(MismatchError, match=rf"DataParallel\({name}=\).* on rank 1"):
        mpiddl.DataParallel(Backwards(), **mine)
    agree(True)
