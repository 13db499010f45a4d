"""World size changes speed, never results; and what else the wrapper promises."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from samples import seeded
from torch import nn
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.engine import scheduler
from mpiddl.engine.engine import engine_of
from mpiddl.errors import GradientError, MismatchError

pytestmark = [pytest.mark.layout, pytest.mark.device]

SAMPLES, FEATURES = 50, 6


def data():
    generator = seeded(5)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    return inputs, inputs.sin().sum(1, keepdim=True)


def make_model(dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1)]
    return nn.Sequential(*layers).to(dtype)


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train_alone(model, batches, drop=None):
    """The oracle: the same global batches on one rank, without MPI."""
    inputs, targets = data()
    optimizer = make_optimizer(model)
    for batch in batches:
        optimizer.zero_grad()
        mse_loss(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    return model


def global_batches(batch_size, epochs):
    """The global batches of a world of one."""
    from types import SimpleNamespace

    alone = SimpleNamespace(rank=0, size=1)
    sampler = mpiddl.ShardBatchSampler(SAMPLES, alone, batch_size=batch_size, seed=3)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yield from sampler


def distance(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("bucket_size", [500, 2000, "25MiB"])
@pytest.mark.parametrize("algorithm", ["ring", "reference", "library"])
@pytest.mark.parametrize("batch_size", [10, 12, 49])  # 49 leaves a last batch of one sample
def test_same_parameters_on_any_number_of_ranks(world, agree, bucket_size, algorithm, batch_size):
    epochs = 4 if batch_size < 49 else 10  # at least 20 steps
    inputs, targets = data()
    model = mpiddl.DataParallel(make_model(), bucket_size=bucket_size, algorithm=algorithm)
    optimizer = make_optimizer(model)
    batches = mpiddl.ShardBatchSampler(SAMPLES, world, batch_size=batch_size, seed=3)
    steps = 0
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for part in batches:
            optimizer.zero_grad()
            with model.batch(local=len(part), total=batches.total):
                mse_loss(model(inputs[part]), targets[part]).backward()
            optimizer.step()
            steps += 1

    alone = train_alone(make_model(), global_batches(batch_size, epochs))
    agree(steps >= 20, steps)
    agree(distance(model.module, alone) < 1e-10, distance(model.module, alone))
    mpiddl.replicas.check(model)


def local_gradients(model, rank, size):
    """Gradients of rank ``rank``'s share of the data, without MPI."""
    inputs, targets = data()
    alone = copy.deepcopy(model)
    mse_loss(alone(inputs[rank::size]), targets[rank::size]).backward()
    return [parameter.grad for parameter in alone.parameters()]


def mean_gradients(model, size):
    everyones = [local_gradients(model, rank, size) for rank in range(size)]
    return [sum(grads) / size for grads in zip(*everyones, strict=True)]


def loss_of(model, world):
    inputs, targets = data()
    return mse_loss(model(inputs[world.rank :: world.size]), targets[world.rank :: world.size])


def close(gradients, want):
    return all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(gradients, want, strict=True)
    )


def gradients_of(model):
    return [parameter.grad for parameter in model.parameters()]


def test_weights_are_equal_unless_said_otherwise(world, agree):
    model = mpiddl.DataParallel(make_model())
    loss_of(model, world).backward()
    agree(close(gradients_of(model), mean_gradients(make_model(), world.size)))


def test_two_backwards_equal_one_on_the_summed_loss(world, agree):
    once, twice = mpiddl.DataParallel(make_model()), mpiddl.DataParallel(make_model())

    (loss_of(once, world) + 3 * loss_of(once, world)).backward()
    loss_of(twice, world).backward()
    (3 * loss_of(twice, world)).backward()

    agree(close(gradients_of(twice), gradients_of(once)))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_views_of_few_buffers_after_either_zero_grad(world, agree, set_to_none):
    model = mpiddl.DataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    want = mean_gradients(make_model(), world.size)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, world).backward()
        agree(close(gradients_of(model), want))
        storages = {grad.untyped_storage().data_ptr() for grad in gradients_of(model)}
        agree(len(storages) == len(model.plan.buckets) == 1, storages)


def test_a_gradient_that_the_user_put_there_is_added_to(world, agree):
    model = mpiddl.DataParallel(make_model())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)

    loss_of(model, world).backward()

    want = [2.0 + grad for grad in mean_gradients(make_model(), world.size)]
    agree(close(gradients_of(model), want))


def test_channels_last_gradients_keep_their_strides(world, agree):
    def make():
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 8, 3).double().to(memory_format=torch.channels_last)
        return nn.Sequential(convolution, nn.Flatten(), nn.Linear(8 * 16, 2).double())

    def loss(model, rank):
        images = torch.randn(2, 3, 6, 6, generator=seeded(rank), dtype=torch.float64)
        return model(images.to(memory_format=torch.channels_last)).square().mean()

    model, want = mpiddl.DataParallel(make()), None
    loss(model, world.rank).backward()
    for rank in range(world.size):
        alone = make()
        loss(alone, rank).backward()
        grads = [grad / world.size for grad in gradients_of(alone)]
        want = grads if want is None else [a + b for a, b in zip(want, grads, strict=True)]

    weight = model.module[0].weight
    agree(weight.grad.stride() == weight.stride() and not weight.grad.is_contiguous())
    agree(close(gradients_of(model), want))


def test_frozen_parameters_stay_out(world, agree):
    module = make_model()
    module[0].requires_grad_(False)
    model = mpiddl.DataParallel(module)

    loss_of(model, world).backward()

    agree(module[0].weight.grad is None and len(model.plan.parameters) == 4)
    want = mean_gradients(make_model(), world.size)
    agree(close(gradients_of(module)[2:], want[2:]))


def test_tied_parameters_are_reduced_once(world, agree):
    def make():
        module = make_model()
        module[2].weight = nn.Parameter(module[2].weight.detach().clone())
        tied = nn.Linear(30, 30).double()
        tied.weight, tied.bias = module[2].weight, module[2].bias
        return nn.Sequential(*module[:4], tied, nn.Tanh(), module[4])

    model = mpiddl.DataParallel(make())
    loss_of(model, world).backward()

    agree(len(model.plan.parameters) == 6, model.plan.parameters)
    agree(close(gradients_of(model), mean_gradients(make(), world.size)))


def test_several_dtypes_get_buckets_of_their_own(world, agree):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.low = nn.Linear(FEATURES, 4).to(torch.bfloat16)
            self.high = nn.Linear(4, 1).double()

        def forward(self, inputs):
            return self.high(self.low(inputs.to(torch.bfloat16)).double())

    model = mpiddl.DataParallel(Mixed())
    loss_of(model, world).backward()

    agree({bucket.dtype for bucket in model.plan.buckets} == {"bfloat16", "float64"})
    for grad, want in zip(gradients_of(model), mean_gradients(Mixed(), world.size), strict=True):
        agree(grad.dtype == want.dtype and torch.allclose(grad, want, rtol=0.05, atol=0.05))


def test_no_sync_accumulates_and_the_next_backward_reduces(world, agree):
    model = mpiddl.DataParallel(make_model())

    with model.no_sync():
        loss_of(model, world).backward()
    local = local_gradients(make_model(), world.rank, world.size)
    agree(close(gradients_of(model), local), "no_sync communicated")
    loss_of(model, world).backward()

    want = [2 * grad for grad in mean_gradients(make_model(), world.size)]
    agree(close(gradients_of(model), want))


@pytest.mark.parametrize("runs_backward", [True, False])
@pytest.mark.parametrize("bad_value", [0.0, float("nan")])
def test_a_rank_without_samples_contributes_zeros(world, agree, runs_backward, bad_value):
    if world.size == 1:
        pytest.skip("one rank has all samples")
    inputs, targets = data()
    model = mpiddl.DataParallel(make_model())
    is_empty = world.rank == world.size - 1
    local = 0 if is_empty else 4
    total = 4 * (world.size - 1)

    with model.batch(local=local, total=total):
        part = slice(4 * world.rank, 4 * world.rank + local)
        if not is_empty:
            mse_loss(model(inputs[part]), targets[part]).backward()
        elif runs_backward:
            (model(inputs[:1]).sum() * bad_value).backward()

    alone = make_model()
    mse_loss(alone(inputs[:total]), targets[:total]).backward()
    agree(close(gradients_of(model), gradients_of(alone)))


@pytest.mark.parametrize(("local", "total"), [(-1, 4), (5, 4), (0, 0)])
def test_impossible_shares_are_refused(world, agree, local, total):
    model = mpiddl.DataParallel(make_model())
    with (
        pytest.raises(ValueError, match=f"{local} of {total}"),
        model.batch(local=local, total=total),
    ):
        pass
    agree(True)


def test_parameters_and_buffers_start_as_rank_0s(world, agree):
    def make(seed):
        module = nn.Sequential(make_model(seed=seed), nn.BatchNorm1d(1).double())
        module[1].running_mean.fill_(seed)
        module.register_buffer("strided", (torch.arange(12) + seed).reshape(3, 4).t()[::2])
        module.register_buffer("flags", torch.tensor([seed % 2 == 0]))
        return module

    module = make(world.rank)
    module[0][0].weight.data = module[0][0].weight.data.t().contiguous().t()
    model = mpiddl.DataParallel(module, check=False)

    want = make(0).state_dict()
    same = {name: torch.equal(tensor, want[name]) for name, tensor in module.state_dict().items()}
    agree(all(same.values()), same)
    mpiddl.replicas.check(model)


def test_looks_like_the_model_inside(world, agree):
    module = make_model()
    module.classes = ["a", "b"]
    model = mpiddl.DataParallel(module)

    agree(model.classes is module.classes and model.module is module)
    agree(list(model.state_dict()) == list(module.state_dict()), list(model.state_dict()))
    other = make_model(seed=9)
    model.load_state_dict(other.state_dict())
    agree(distance(module, other) == 0)
    model.eval()
    agree(not module.training)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        model.nothing_like_it  # noqa: B018


def test_a_missing_gradient_names_the_parameter(world, agree):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, inputs):
            return self.used(inputs)

    model = mpiddl.DataParallel(Branches())
    with pytest.raises(GradientError, match="'unused.weight', 'unused.bias'"):
        model(torch.ones(1, 2)).sum().backward()
    agree(True)


def test_models_that_cannot_be_wrapped(world, agree):
    with pytest.raises(ValueError, match="wrapped in DataParallel already"):
        mpiddl.DataParallel(mpiddl.DataParallel(make_model()))
    with pytest.raises(ValueError, match="is wrapped in DataParallel already"):
        mpiddl.DataParallel(nn.Sequential(mpiddl.DataParallel(make_model())))
    with pytest.raises(ValueError, match="ReLU has no parameter"):
        mpiddl.DataParallel(nn.ReLU())
    with pytest.raises(ValueError, match=r"'weight' is torch.complex64.*torch.view_as_real"):
        mpiddl.DataParallel(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="run one forward"):
        mpiddl.DataParallel(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="'weight' is on the meta device.*to_empty"):
        mpiddl.DataParallel(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="unknown algorithm 'tree'"):
        mpiddl.DataParallel(make_model(), algorithm="tree")
    with pytest.raises(ValueError, match="positive"):
        mpiddl.DataParallel(make_model(), bucket_size=0)
    with pytest.raises(ValueError, match="25 potatoes"):
        mpiddl.DataParallel(make_model(), bucket_size="25 potatoes")
    agree(True)


@pytest.mark.parametrize(
    ("usual", "odd", "word"),
    [
        (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 5), "'weight: float32[5, 3]"),
        (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 4).double(), "'weight: float64[4, 3]"),
        (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 4, bias=False), "'bias: float32[4]"),
        (
            lambda: nn.Conv2d(2, 2, 2),
            lambda: nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last),
            "strides [8, 1, 4, 2]",
        ),
    ],
    ids=["shape", "dtype", "parameter", "strides"],
)
def test_different_models_name_rank_and_parameter(world, agree, usual, odd, word):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    last = world.size - 1
    try:
        mpiddl.DataParallel(odd() if world.rank == last else usual())
    except MismatchError as error:
        message = str(error)
    else:
        message = "no error"
    agree(word in message and f"rank {last}" in message, message)


def test_different_bucket_sizes_or_algorithms_are_found(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    is_first = world.rank == 0
    with pytest.raises(MismatchError, match="bucket"):
        mpiddl.DataParallel(make_model(), bucket_size=64 if is_first else 4096)
    with pytest.raises(MismatchError, match="algorithm"):
        mpiddl.DataParallel(make_model(), algorithm="ring" if is_first else "library")
    agree(True)


def test_two_models_in_one_step(world, agree):
    """As in a GAN: gradients of one must not end up in the other."""
    first, second = mpiddl.DataParallel(make_model()), mpiddl.DataParallel(make_model(seed=2))

    (loss_of(first, world) + loss_of(second, world)).backward()

    agree(close(gradients_of(first), mean_gradients(make_model(), world.size)))
    agree(close(gradients_of(second), mean_gradients(make_model(seed=2), world.size)))


def test_a_model_on_a_group(world, agree):
    group = world.split(world.rank % 2)
    members = range(world.rank % 2, world.size, 2)
    model = mpiddl.DataParallel(make_model(), world=group)

    loss_of(model, world).backward()

    everyones = [local_gradients(make_model(), rank, world.size) for rank in members]
    want = [sum(grads) / len(members) for grads in zip(*everyones, strict=True)]
    agree(close(gradients_of(model), want))
    group.close()


def test_stats_count_what_was_exchanged(world, agree):
    model = mpiddl.DataParallel(make_model())
    for _ in range(3):
        loss_of(model, world).backward()

    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    stats = model.stats()
    agree(stats.backwards == 3 and stats.reduced_bytes == 3 * nbytes, stats)
    agree(stats.exposed_seconds > 0, stats)


@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_buckets_are_exchanged_while_backward_runs(world, agree, engine):
    """Backward is held in the first layer until the last layer's bucket is complete everywhere."""
    model = mpiddl.DataParallel(make_model(), bucket_size=2000, engine=engine)
    driver = engine_of(world)
    complete = []

    def hold(gradient):
        work = model.strategy.scheduler.works[0]
        deadline = time.monotonic() + 300
        while work and not work.complete and time.monotonic() < deadline:
            if engine == "inline":
                driver.poll()
        complete.append(bool(work) and work.complete)

    model.module[0].weight.register_hook(hold)
    loss_of(model, world).backward()

    agree(complete == [True], "nothing was complete before the end of backward")
    agree(close(gradients_of(model), mean_gradients(make_model(), world.size)))


def test_a_model_is_wrapped_once_at_a_time(world, agree):
    module = make_model()
    model = mpiddl.DataParallel(module)
    with pytest.raises(ValueError, match="wrapped in DataParallel already"):
        mpiddl.DataParallel(module)

    agree(model.unwrap() is module)
    again = mpiddl.DataParallel(module)
    loss_of(again, world).backward()

    agree(close(gradients_of(again), mean_gradients(make_model(), world.size)))


def test_a_dropped_wrapper_is_missed(world, agree):
    module = make_model()
    mpiddl.DataParallel(module)
    with pytest.raises(GradientError, match="is gone"):
        loss_of(module, world).backward()

    model = mpiddl.DataParallel(module)  # wrapping again takes the old hooks off
    model.zero_grad()
    loss_of(model, world).backward()
    agree(close(gradients_of(model), mean_gradients(make_model(), world.size)))


def test_unwrapped_models_train_alone_and_give_their_tags_back(world, agree):
    left = len(world.tags._free)
    module = mpiddl.DataParallel(make_model(), bucket_size=1).unwrap()
    module.zero_grad()
    loss_of(module, world).backward()

    agree(close(gradients_of(module), local_gradients(make_model(), world.rank, world.size)))
    agree(len(world.tags._free) == left, "tags are lost")


class FailsOnDemand(torch.autograd.Function):
    fail = False

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        if FailsOnDemand.fail:
            raise RuntimeError("on demand")
        return gradient


@pytest.mark.parametrize("bucket_size", ["25MiB", 2000])
def test_after_a_backward_that_raised_on_all_ranks_training_goes_on(
    world, agree, bucket_size, monkeypatch
):
    """With one bucket nothing was in flight, with several the first was."""
    model = mpiddl.DataParallel(make_model(), bucket_size=bucket_size, engine="inline")
    inputs, targets = data()
    hidden = FailsOnDemand.apply(model.module[:2](inputs))
    monkeypatch.setattr(FailsOnDemand, "fail", True)
    with pytest.raises(RuntimeError, match="on demand"):
        mse_loss(model.module[2:](hidden), targets).backward()
    agree(True)  # every rank's backward has raised

    model.zero_grad()
    loss_of(model, world).backward()

    agree(close(gradients_of(model), mean_gradients(make_model(), world.size)))


def test_batch_and_no_sync_do_not_mix(world, agree):
    model = mpiddl.DataParallel(make_model())
    with model.no_sync(), pytest.raises(ValueError, match="no_sync"):
        model.batch(local=1, total=world.size).__enter__()
    with model.batch(local=1, total=world.size), pytest.raises(ValueError, match="no_sync"):
        model.no_sync().__enter__()
    agree(True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.register_buffer("odd", torch.zeros(3)),
        lambda model: model.register_buffer("same", torch.zeros(3)),
        lambda model: model.frozen.to(memory_format=torch.channels_last),
        lambda model: model.frozen.requires_grad_(True),
    ],
    ids=["another buffer", "a longer buffer", "frozen strides", "unfrozen"],
)
def test_tensors_that_are_not_trained_are_compared_too(world, agree, spoil):
    if world.size == 1:
        pytest.skip("one rank cannot differ")
    model = nn.Linear(2, 2)
    model.frozen = nn.Conv2d(2, 2, 2).requires_grad_(False)
    model.register_buffer("same", torch.zeros(2))
    if world.rank == world.size - 1:
        spoil(model)
    with pytest.raises(MismatchError, match=f"on rank {world.size - 1}"):
        mpiddl.DataParallel(model)
    agree(True)


def test_replaced_parameters_are_refused(world, agree):
    model = mpiddl.DataParallel(make_model())
    model.load_state_dict(make_model().state_dict(), assign=True)
    with pytest.raises(GradientError, match=r"'0\.weight'.*wrap again"):
        loss_of(model, world)
    agree(True)


def test_a_module_around_the_wrapper_saves_and_loads(world, agree):
    around = nn.ModuleDict({"inner": mpiddl.DataParallel(make_model())})
    other = nn.ModuleDict({"inner": make_model(seed=8)})

    agree(list(around.state_dict()) == list(other.state_dict()), list(around.state_dict()))
    around.load_state_dict(other.state_dict())
    agree(distance(around, other) == 0)


def test_after_a_backward_that_raised_on_one_rank_the_next_is_refused(world, agree, monkeypatch):
    if world.size == 1:
        pytest.skip("nothing can be left in flight")
    monkeypatch.setattr(scheduler, "LEFT_OVER_SECONDS", 0.1)
    group = world.split(0)
    model = mpiddl.DataParallel(make_model(), bucket_size=2000, world=group, engine="inline")
    inputs, targets = data()
    if world.rank == 0:
        hidden = FailsOnDemand.apply(model.module[:2](inputs))
        monkeypatch.setattr(FailsOnDemand, "fail", True)
        with pytest.raises(RuntimeError, match="on demand"):
            mse_loss(model.module[2:](hidden), targets).backward()
        model.zero_grad()
        with pytest.raises(GradientError, match="earlier backward"):
            loss_of(model, world).backward()
    agree(True)
    group.close()
