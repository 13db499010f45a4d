"""Normalised by the global batch: against torch's layer on that batch, on one rank."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from samples import seeded
from torch import nn
from torch.nn.functional import mse_loss

import mpiddl
from mpiddl.errors import GradientError
from mpiddl.training import sync_batch_norm

pytestmark = [pytest.mark.layout, pytest.mark.device]

CHANNELS = 3
LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
UNEVEN = (4, 1, 0, 3)
"""Rows of each rank: one of them has none."""


def inputs_of(rank, rows, dims=3, offset=0.0, dtype=torch.float64):
    """``dims`` of them beyond the rows: channels, and places."""
    generator = seeded(rank)
    shape = (rows, CHANNELS, 2, 3, 2)[: dims + 1]
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * (rank + 1)
    return (values + offset).to(dtype)


def layer_of(dims=3, dtype=torch.float64, **options):
    layer = LAYERS[dims](CHANNELS, dtype=dtype, **options)
    for number, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(torch.arange(CHANNELS) / 4 + 0.75 + number)  # exact in every dtype
    return layer


def near(a, b, tolerance=1e-12):
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def one_rank(layer, parts, weights):
    """The oracle: one pass over the global batch; this loss weights each rank's mean.

    Returns:
        Outputs, gradients of inputs and parameters.
    """
    whole = torch.cat(parts).requires_grad_()
    outputs = layer(whole)
    lengths = [len(part) for part in parts]
    losses = [
        weight * rows.sin().mean()
        for weight, rows in zip(weights, outputs.split(lengths), strict=True)
        if len(rows)
    ]
    sum(losses).backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    return outputs.split(lengths), whole.grad.split(lengths), gradients


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(2, 2, 2, 2), UNEVEN], ids=["even", "uneven"])
def test_as_one_rank_with_the_global_batch(world, agree, dims, options, lengths):
    parts = [inputs_of(rank, lengths[rank], dims) for rank in range(world.size)]
    alone, layer = layer_of(dims, **options), layer_of(dims, **options)
    layer = mpiddl.SyncBatchNorm.convert(layer)
    for _ in range(2):
        alone.zero_grad()
        layer.zero_grad()
        want, want_inputs, want_parameters = one_rank(alone, parts, [1.0] * world.size)

        mine = parts[world.rank].clone().requires_grad_()
        outputs = layer(mine)
        loss = outputs.sin().mean() if len(mine) else outputs.sum()
        loss.backward()

        agree(near(outputs, want[world.rank]), "outputs")
        agree(near(mine.grad, want_inputs[world.rank]), "gradients of inputs")
        for parameter, gradient in zip(layer.parameters(), want_parameters, strict=True):
            agree(near(mpiddl.all_reduce(parameter.grad), gradient), "gradients of parameters")
    for name, buffer in alone.named_buffers():
        agree(near(layer.get_buffer(name), buffer), name)

    alone.eval(), layer.eval()
    probe = inputs_of(world.rank + 9, 2 + world.rank, dims)  # another number on every rank
    agree(near(layer(probe), alone(probe)), "eval mode")


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_mean_far_from_zero_costs_no_digits(world, agree, offset):
    parts = [inputs_of(rank, 50, 3, offset, torch.float32) for rank in range(world.size)]
    layer = mpiddl.SyncBatchNorm(CHANNELS, momentum=1.0)

    layer(parts[world.rank])

    exact = torch.cat(parts).double().transpose(0, 1).flatten(1)
    agree(near(layer.running_mean, exact.mean(1), 1e-6), layer.running_mean)
    agree(near(layer.running_var, exact.var(1), 1e-6), layer.running_var - exact.var(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["mixed", "same"])
def test_16_bit_inputs_are_computed_with_in_float32(world, agree, dtype, parameters):
    parts = [inputs_of(rank, 4, 3, 0.0, dtype) for rank in range(world.size)]
    layer = mpiddl.SyncBatchNorm.convert(layer_of(3, parameters or dtype))
    mine = parts[world.rank].clone().requires_grad_()

    outputs = layer(mine)
    outputs.float().sin().mean().backward()

    want, want_inputs, _ = one_rank(
        layer_of(3, torch.float64), [part.double() for part in parts], [1.0] * world.size
    )
    eps = torch.finfo(dtype).eps
    agree(outputs.dtype == mine.grad.dtype == dtype)
    agree(near(outputs, want[world.rank], 4 * eps), outputs)
    agree(near(mine.grad, want_inputs[world.rank], 4 * eps), mine.grad)


def model_of():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1)
    ).double()


@pytest.mark.parametrize("total", [1, 2, 7])
def test_world_size_never_changes_results(world, agree, total):
    """Uneven parts, empty ones too, weighted by ``model.batch``; tiny buckets are in flight."""
    model = mpiddl.DataParallel(mpiddl.SyncBatchNorm.convert(model_of()), bucket_size=64)
    alone = model_of()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, alone)]
    for step in range(4):
        everything = inputs_of(step, total)
        mine = everything[world.rank :: world.size]
        for optimizer in optimizers:
            optimizer.zero_grad()
        with model.batch(local=len(mine), total=total):
            mse_loss(model(mine), mine.sum((1, 2, 3))[:, None]).backward()
        mse_loss(alone(everything), everything.sum((1, 2, 3))[:, None]).backward()
        for optimizer in optimizers:
            optimizer.step()

    for name, tensor in alone.state_dict().items():
        agree(near(model.state_dict()[name], tensor, 1e-10), name)
    mpiddl.replicas.check(model, buffers=True)


def test_a_dummy_batch_of_a_rank_without_samples_does_not_count(world, agree):
    if world.size == 1:
        pytest.skip("one rank has all samples")
    model = mpiddl.DataParallel(mpiddl.SyncBatchNorm.convert(model_of()))
    alone, everything = model_of(), inputs_of(0, world.size - 1)
    local = int(world.rank < world.size - 1)
    mine = everything[world.rank : world.rank + 1] if local else inputs_of(9, 2) * float("nan")
    with model.batch(local=local, total=len(everything)):
        model(mine).square().mean().backward()
    alone(everything).square().mean().backward()

    for parameter, want in zip(model.parameters(), alone.parameters(), strict=True):
        agree(near(parameter.grad, want.grad, 1e-10), parameter.grad)
    agree(near(model.module[1].running_var, alone[1].running_var))


def test_conversion_keeps_tensors_and_places(world, agree):
    shared = nn.BatchNorm2d(4)
    module = nn.ModuleDict(
        {
            "one": nn.Sequential(shared, nn.BatchNorm1d(4).eval()),
            "same": shared,
            "torch": nn.SyncBatchNorm(4, momentum=None),
        }
    )
    before = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    names = list(module.state_dict())

    agree(mpiddl.SyncBatchNorm.convert(module) is module)

    agree({id(tensor) for tensor in [*module.parameters(), *module.buffers()]} == before)
    agree(list(module.state_dict()) == names)
    layers = [layer for layer in module.modules() if not list(layer.children())]
    agree([type(layer) for layer in layers] == [mpiddl.SyncBatchNorm] * 3, layers)
    agree(module["same"] is module["one"][0] and module["torch"].momentum is None)
    agree(module["one"][0].training and not module["one"][1].training)
    agree(type(mpiddl.SyncBatchNorm.convert(nn.BatchNorm3d(2))) is mpiddl.SyncBatchNorm)


def test_layers_that_cannot_be_converted(world, agree, caplog):
    class Own(nn.BatchNorm2d):
        def forward(self, inputs):
            return super().forward(inputs) + 1

    with pytest.raises(ValueError, match="'0' has no shape yet"):
        mpiddl.SyncBatchNorm.convert(nn.Sequential(nn.LazyBatchNorm2d()))
    with caplog.at_level("WARNING", logger="mpiddl"):
        module = mpiddl.SyncBatchNorm.convert(nn.Sequential(Own(2)))
    agree(type(module[0]) is Own)


def test_gradients_of_gradients_are_refused_with_a_way_out(world, agree):
    layer = mpiddl.SyncBatchNorm(2)
    inputs = torch.randn(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(GradientError, match=r"differentiated twice.*GroupNorm"):
        gradient.square().sum().backward()
    agree(True)


def test_torchs_layer_is_refused_at_wrapping(world, agree):
    with pytest.raises(ValueError, match=r"'0' is torch.nn.SyncBatchNorm.*convert\(model\)"):
        mpiddl.DataParallel(nn.Sequential(nn.SyncBatchNorm(2)))
    agree(True)


def test_layers_of_a_model_on_a_group(world, agree):
    group = world.split(world.rank % 2)
    with pytest.raises(ValueError, match=r"'1' takes.*world=group"):
        mpiddl.DataParallel(mpiddl.SyncBatchNorm.convert(model_of()), world=group)
    module = mpiddl.SyncBatchNorm.convert(model_of(), world=group)
    agree(copy.deepcopy(module)[1].world is group)
    model = mpiddl.DataParallel(module, world=group)
    alone = model_of()

    model(inputs_of(world.rank, 2))

    alone(torch.cat([inputs_of(rank, 2) for rank in range(world.rank % 2, world.size, 2)]))
    agree(near(module[1].running_var, alone[1].running_var))
    group.close()


def test_layers_are_copied_and_saved(world, agree):
    model = mpiddl.DataParallel(mpiddl.SyncBatchNorm.convert(model_of()))
    model(inputs_of(world.rank, 2))
    for other in (copy.deepcopy(model.module), pickle.loads(pickle.dumps(model.module))):
        agree(all(map(torch.equal, other.state_dict().values(), model.state_dict().values())))
        other(inputs_of(world.rank, 2))
        agree(int(other[1].num_batches_tracked) == 2)


@pytest.mark.parametrize("inputs", [torch.zeros(2), torch.zeros(2, 4), torch.zeros(0, 3)], ids=str)
def test_inputs_that_have_no_statistics(world, agree, inputs):
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        mpiddl.SyncBatchNorm(CHANNELS)(inputs.to(world.device))
    agree(True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own
def test_compiled(world, agree):
    module = mpiddl.SyncBatchNorm.convert(model_of())
    model = mpiddl.DataParallel(module)
    compiled = torch.compile(model, backend="aot_eager")
    alone, parts = model_of(), [inputs_of(rank, 2) for rank in range(world.size)]

    compiled(parts[world.rank]).square().mean().backward()

    alone(torch.cat(parts)).square().mean().backward()
    for parameter, want in zip(model.parameters(), alone.parameters(), strict=True):
        agree(near(parameter.grad, want.grad, 1e-10), parameter.grad)
    agree(bool(sync_batch_norm._wrappers[module[1]]() is model))
