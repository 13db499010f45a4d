"""The exchange goes on into the next forward, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from samples import seeded
from torch import nn

import mpiddl
from mpiddl.errors import GradientError

pytestmark = pytest.mark.device

STEPS = 6


class Tied(nn.Module):
    """Uses weights in unusual places: before their module, without it, twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = nn.functional.linear(x, self.inner.weight)  # not through the module, nor with its bias
        x = self.norm((x + self.inner.bias).transpose(1, 2)).transpose(1, 2)
        return self.out(x)


def make(kind):
    torch.manual_seed(5)
    if kind == "tied":
        return Tied()
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
    )


def batch(kind, world, step):
    generator = seeded(100 * step + world.rank)
    if kind == "tied":
        return torch.randint(0, 12, (3, 5), generator=generator)
    return torch.randn(4, 6, generator=generator)


OPTIMIZERS = {
    "sgd": lambda: (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": lambda: (torch.optim.Adam, {"lr": 0.01}),
    "adamw": lambda: (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "adagrad": lambda: (torch.optim.Adagrad, {"lr": 0.05}),
    "rmsprop": lambda: (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
}


def stepper_of(model, overlaps, optimizer_class, **arguments):
    if overlaps:
        return mpiddl.OverlappedOptimizer(optimizer_class, model, **arguments)
    return optimizer_class(model.parameters(), **arguments)


def train(world, kind, optimizer, overlaps, engine="inline", schedule=True, **options):
    """A usual loop; the model and everything in the optimizer at its end."""
    model = mpiddl.DataParallel(make(kind), engine=engine, bucket_size=300, **options)
    optimizer_class, arguments = OPTIMIZERS[optimizer]()
    stepper = stepper_of(model, overlaps, optimizer_class, **arguments)
    scheduler = torch.optim.lr_scheduler.StepLR(stepper, 2, gamma=0.5) if schedule else None
    for step in range(STEPS):
        stepper.zero_grad()
        model(batch(kind, world, step)).float().square().mean().backward()
        stepper.step()
        if scheduler:
            scheduler.step()
    return model, stepper


def same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == theirs and torch.equal(a, b) for (name, a), (theirs, b) in pairs)


def same_state(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("kind", ["mlp", "tied"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bit_for_bit_the_plain_loop(world, agree, kind, optimizer, engine):
    plain, plain_optimizer = train(world, kind, optimizer, overlaps=False, engine=engine)
    model, stepper = train(world, kind, optimizer, overlaps=True, engine=engine)

    agree(same(plain, model))
    agree(same_state(plain_optimizer.state_dict(), stepper.state_dict()))
    mpiddl.replicas.check(model)


def test_the_learning_rate_counts_as_at_the_step(world, agree):
    """A schedule that changes it every step, right after ``step()``."""
    results = []
    for overlaps in (False, True):
        model = mpiddl.DataParallel(make("mlp"), bucket_size=300, engine="inline")
        stepper = stepper_of(model, overlaps, torch.optim.SGD, lr=1.0)
        for step in range(STEPS):
            stepper.zero_grad()
            model(batch("mlp", world, step)).square().mean().backward()
            stepper.step()
            stepper.param_groups[0]["lr"] *= 0.5
        results.append(model)
    agree(same(*results))


def test_states_are_those_of_the_plain_optimizer(world, agree):
    plain, plain_optimizer = train(world, "mlp", "adam", overlaps=False, schedule=False)
    _model, stepper = train(world, "mlp", "adam", overlaps=True, schedule=False)
    saved = copy.deepcopy(plain_optimizer.state_dict())

    stepper.load_state_dict(saved)
    other = torch.optim.Adam(plain.parameters(), lr=0.01)
    other.load_state_dict(stepper.state_dict())

    agree(same_state(other.state_dict(), saved))


def test_buckets_are_in_flight_after_backward_and_gradients_refuse_to_be_read(world, agree):
    model = mpiddl.DataParallel(make("mlp"), bucket_size=300)
    stepper = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    model(batch("mlp", world, 0)).square().mean().backward()

    with pytest.raises(GradientError, match="wait_for_gradients"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(GradientError, match="wait_for_gradients"):
        _ = next(model.parameters()).grad + 1
    agree(True)
    stepper.synchronize()


def test_what_the_next_forward_needs_first_is_the_most_urgent(world, agree):
    model = mpiddl.DataParallel(make("mlp"), bucket_size=300)
    model(batch("mlp", world, 0)).square().mean().backward()

    scheduler = model.strategy.scheduler
    urgency = [work.priority for work in scheduler.works]
    agree(len(urgency) > 2 and urgency == sorted(set(urgency)), urgency)
    first, *_, last = (model.strategy.gradients.buckets_of(member) for member in range(6))
    agree(max(urgency) == urgency[first[-1].number] > urgency[last[-1].number], urgency)


def test_what_rank_0_writes_to_its_buffers_after_backward_stays(world, agree):
    model = mpiddl.DataParallel(make("tied"), bucket_size=300)
    stepper = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    model(batch("tied", world, 0)).square().mean().backward()
    mean = model.module.norm.running_mean
    with torch.no_grad():
        mean.fill_(3.0)
    stepper.synchronize()
    agree(world.rank > 0 or mean.tolist() == [3.0] * 8, mean)


def test_a_module_waits_for_its_own_parameters_only(world, agree):
    """The last layer's bucket goes on once the first layer's forward is over."""
    model = mpiddl.DataParallel(make("mlp"), bucket_size=300, engine="inline")
    released = []

    class Gate:
        polls = 0

        def done(self):
            self.polls += 1
            assert self.polls < 100_000, "nothing but the last layer was waited for"
            return bool(released)

    def hook(state, bucket):
        if "4.weight" in bucket.names:
            yield Gate()
        yield from bucket.all_reduce(bucket.buffer, weight=bucket.weight)

    stepper = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    model.register_comm_hook(None, hook)
    model.module[0].register_forward_hook(lambda *_: released.append("by the first layer"))
    for step in range(3):
        loss = model(batch("mlp", world, step)).square().mean()
        released.clear()
        loss.backward()
        stepper.step()
    released.append("by the end")
    stepper.synchronize()
    agree(True)


class Counting(torch.optim.SGD):
    """Keeps a count in its groups, as optimizers with schedules of their own do."""

    def step(self):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        super().step()


class Averaging(torch.optim.SGD):
    """Evaluates an average of the weights, as schedule-free optimizers do: swaps them in place."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_swaps = 0

    @torch.no_grad()
    def swap(self):
        self.num_swaps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter, 0.5)
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    @property
    def largest(self):
        return max(p.abs().max().item() for group in self.param_groups for p in group["params"])


def test_the_optimizers_own_methods_come_after_the_steps_that_are_owed(world, agree):
    torch.manual_seed(5)
    nets = [nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 1))]
    nets.append(copy.deepcopy(nets[0]))
    models = [mpiddl.DataParallel(net, bucket_size=8192) for net in nets]
    optimizers = [
        Averaging(models[0].parameters(), lr=0.1),
        mpiddl.OverlappedOptimizer(Averaging, models[1], lr=0.1),
    ]
    seen = []
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            swap = optimizer.swap  # looked up before the step, called after it
            inputs = torch.randn(4, 64, generator=seeded(step + world.rank))
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            seen.append(optimizer.largest)
            swap()
    agree(seen[::2] == seen[1::2], seen)
    agree(same(*nets) and optimizers[1].num_swaps == 4)
    assert not hasattr(optimizers[1], "no_such_thing")


class Words(nn.Module):
    """With a sparse gradient, which is not in any bucket."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8, sparse=True)
        self.out = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.out(self.embedding(tokens).mean(1))


@pytest.mark.parametrize("optimizer_class", [Counting, torch.optim.SGD])
def test_sparse_gradients_and_what_a_step_writes_into_groups(world, agree, optimizer_class):
    models, groups = [], []
    for overlaps in (False, True):
        torch.manual_seed(3)
        model = mpiddl.DataParallel(Words(), bucket_size=100)
        stepper = stepper_of(model, overlaps, optimizer_class, lr=0.1)
        for step in range(STEPS):
            stepper.zero_grad()
            model(batch("tied", world, step)).square().mean().backward()
            stepper.step()
        models.append(model)
        groups.append(stepper.state_dict()["param_groups"])
    agree(same(*models) and groups[0] == groups[1], groups)


@pytest.mark.parametrize("waits", [True, False])
def test_clipping_is_right(world, agree, waits):
    """torch's after waiting; ours waits by itself."""
    clip = torch.nn.utils.clip_grad_norm_ if waits else mpiddl.clip_grad_norm_
    results = []
    for overlaps in (False, True):
        model = mpiddl.DataParallel(make("mlp"), bucket_size=300, engine="inline")
        stepper = stepper_of(model, overlaps, torch.optim.SGD, lr=0.5)
        for step in range(STEPS):
            stepper.zero_grad()
            model(batch("mlp", world, step)).square().mean().backward()
            if overlaps and waits:
                stepper.wait_for_gradients()
            clip(model.parameters(), 0.01)
            stepper.step()
        results.append(model)
    agree(same(*results))


def test_steps_may_be_left_out(world, agree):
    """Gradients that were looked at and dropped are gone, as in the plain loop."""
    results = []
    for overlaps in (False, True):
        model = mpiddl.DataParallel(make("mlp"), bucket_size=300, engine="inline")
        stepper = stepper_of(model, overlaps, torch.optim.SGD, lr=0.5)
        for step in range(STEPS):
            stepper.zero_grad(set_to_none=step % 4 != 3)
            model(batch("mlp", world, step)).square().mean().backward()
            if overlaps and step % 2:
                stepper.wait_for_gradients()
            if step % 3:
                stepper.step()
        results.append(model)
    agree(same(*results))


@pytest.mark.thorough
@pytest.mark.parametrize("compiled", ["torch.compile", "in place", "a part in place"])
def test_compiled_models(world, agree, compiled):
    """They are waited for as a whole, and come out the same."""
    results = []
    for overlaps in (False, True):
        inner = make("mlp")
        if compiled == "torch.compile":
            module = torch.compile(inner, backend="aot_eager")
        else:
            module = inner
            (inner if compiled == "in place" else inner[2]).compile(backend="aot_eager")
        model = mpiddl.DataParallel(module, bucket_size=300, engine="after")
        stepper = stepper_of(model, overlaps, torch.optim.SGD, lr=0.1, momentum=0.9)
        for step in range(4):
            stepper.zero_grad()
            model(batch("mlp", world, step)).square().mean().backward()
            stepper.step()
        model.synchronize()
        results.append(model)
    agree(same(*results))


@pytest.mark.parametrize("way", ["load", "load inside", "unwrap"])
def test_what_is_owed_comes_before_the_model_is_changed(world, agree, way):
    results = []
    for overlaps in (False, True):
        model = mpiddl.DataParallel(make("mlp"), bucket_size=300, engine="after")
        best = {name: value.clone() for name, value in model.state_dict().items()}
        stepper = stepper_of(model, overlaps, torch.optim.SGD, lr=0.5)
        for step in range(3):
            stepper.zero_grad()
            model(batch("mlp", world, step)).square().mean().backward()
            stepper.step()
        if way == "unwrap":
            model = mpiddl.DataParallel(model.unwrap())
        else:
            (model if way == "load" else model.module).load_state_dict(best)
        mpiddl.replicas.check(model)
        results.append(model)
    agree(same(*results))


def test_two_backwards_after_one_another_are_refused(world, agree):
    model = mpiddl.DataParallel(make("mlp"), bucket_size=300, engine="after")
    stepper = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.5)
    first, second = (model(batch("mlp", world, step)).square().mean() for step in (0, 1))
    first.backward()
    with pytest.raises(GradientError, match="between them"):
        second.backward()
    stepper.wait_for_gradients()
    agree(True)


def test_in_join(world, agree):
    """Rank r has r+2 batches; what the last rank still owes at the end is on all."""
    results = []
    for overlaps in (False, True):
        model = mpiddl.DataParallel(make("mlp"), bucket_size=300, engine="after")
        stepper = stepper_of(model, overlaps, torch.optim.Adam, lr=0.01)
        for epoch in range(2):
            with mpiddl.join(model, optimizers=[stepper]):
                for step in range(world.rank + 2):
                    stepper.zero_grad()
                    model(batch("mlp", world, step + 9 * epoch)).square().mean().backward()
                    stepper.step()
            mpiddl.replicas.check(model)
        results.append(model)
    agree(same(*results))


def test_accumulation_and_evaluation_in_between(world, agree):
    results = []
    for overlaps in (False, True):
        model = mpiddl.DataParallel(make("tied"), bucket_size=300, engine="inline")
        stepper = stepper_of(model, overlaps, torch.optim.SGD, lr=0.1)
        outputs = []
        for step in range(STEPS):
            stepper.zero_grad()
            with model.no_sync():
                model(batch("tied", world, step)).square().mean().backward()
            model(batch("tied", world, step + 50)).square().mean().backward()
            model(batch("tied", world, step + 99)).square().mean().backward()  # two exchanges
            stepper.step()
            model.eval()
            with torch.no_grad():
                outputs.append(model.module(batch("tied", world, 0)))
            model.train()
        results.append((model, outputs))
    (plain, expected), (model, outputs) = results
    agree(same(plain, model))
    agree(all(map(torch.equal, expected, outputs)))


def test_parameters_may_be_frozen_and_unused(world, agree):
    results = []
    for overlaps in (False, True):
        module = make("mlp")
        model = mpiddl.DataParallel(module, bucket_size=300, find_unused_parameters=True)
        stepper = stepper_of(model, overlaps, torch.optim.Adam, lr=0.1)
        for step in range(STEPS):
            module[0].requires_grad_(step % 3 != 1)
            stepper.zero_grad()
            hidden = module[:2] if step == 5 else None  # the others get no gradient
            x = batch("mlp", world, step)
            output = model(x) if hidden is None else _through(model, hidden, x)
            output.square().mean().backward()
            stepper.step()
        results.append(model)
    agree(same(*results))


def _through(model, part, x):
    """A forward of the wrapper of which only a part counts."""
    model(x)
    return part(x)


def test_hooks_of_its_state_and_copies(world, agree):
    model = mpiddl.DataParallel(make("mlp"))
    stepper = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    seen = []
    stepper.register_state_dict_pre_hook(lambda optimizer: seen.append("saving"))
    stepper.register_state_dict_post_hook(lambda optimizer, state: seen.append("saved"))
    stepper.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append("loading"))
    handle = stepper.register_load_state_dict_post_hook(lambda optimizer: seen.append("loaded"))
    stepper.load_state_dict(stepper.state_dict())
    handle.remove()
    stepper.load_state_dict(stepper.state_dict())

    rounds = ["saving", "saved", "loading"]
    agree(seen == [*rounds, "loaded", *rounds], seen)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"Keep its state_dict\(\)"):
            copied(stepper)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        stepper.nothing_like_it  # noqa: B018
    agree(True)


def test_what_cannot_be_overlapped_is_refused(world, agree):
    model = mpiddl.DataParallel(make("mlp"))
    with pytest.raises(TypeError, match=r"mpiddl\.DataParallel"):
        mpiddl.OverlappedOptimizer(torch.optim.SGD, model.module, lr=0.1)
    with pytest.raises(ValueError, match="LBFGS"):
        mpiddl.OverlappedOptimizer(torch.optim.LBFGS, model)
    stepper = mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    with pytest.raises(ValueError, match="already"):
        mpiddl.OverlappedOptimizer(torch.optim.SGD, model, lr=0.1)
    with pytest.raises(ValueError, match="closure"):
        stepper.step(lambda: 0)
    agree(True)
