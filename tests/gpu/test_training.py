"""Training as users write it for GPUs: mixed precision, graphs, layers of all kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import mpiddl
from mpiddl.compress import BF16
from mpiddl.errors import UnsupportedBufferError

CLASSES = 7


def images_of(rank, world, count=4):
    random = torch.Generator().manual_seed(rank)
    images = torch.randn(count, 3, 8, 8, generator=random)
    labels = torch.randint(CLASSES, (count,), generator=random)
    return images.to(world.device), labels.to(world.device)


def convolutions(norm=None):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, CLASSES),
    )


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(50, 16, sparse=sparse)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, images):
        words = (images.flatten(1)[:, :6] * 10).long() % 50
        return self.out(self.table(words).mean(1))


MODELS = {
    "convolutions": convolutions,
    "channels last": lambda: convolutions().to(memory_format=torch.channels_last),
    "half": lambda: convolutions().to(torch.bfloat16),
    "embedding": lambda: Words(False),
    "sparse embedding": lambda: Words(True),
}


def loss_of(model, rank, world):
    images, labels = images_of(rank, world)
    images = images.to(next(model.parameters()).dtype)
    return cross_entropy(model(images).float(), labels)


def mean_gradients(make, world):
    everyones = []
    for rank in range(world.size):
        alone = make().to(world.device)
        loss_of(alone, rank, world).backward()
        everyones.append([parameter.grad.to_dense() for parameter in alone.parameters()])
    return [sum(grads) / world.size for grads in zip(*everyones, strict=True)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("engine", ["inline", "thread", "after"])
def test_gradients_are_the_mean(world, agree, kind, engine):
    make = MODELS[kind]
    want = mean_gradients(make, world)
    model = mpiddl.DataParallel(make().to(world.device), engine=engine, bucket_size="16KiB")
    for _ in range(3):
        model.zero_grad()
        loss_of(model, world.rank, world).backward()
        for (name, parameter), mean in zip(model.module.named_parameters(), want, strict=True):
            size = float(mean.abs().max())
            error = float((parameter.grad.to_dense() - mean).abs().max())
            bound = 0.02 if mean.dtype is torch.bfloat16 else 1e-5
            agree(error <= bound * size + 1e-7, f"{name} off by {error}, largest {size}")
    for parameter in model.parameters():
        agree(parameter.grad.is_sparse or parameter.grad.stride() == parameter.stride())


@pytest.mark.parametrize("synced", [False, True], ids=["BatchNorm", "SyncBatchNorm"])
def test_normalisation(world, agree, synced):
    module = convolutions(norm=True).to(world.device)
    module = mpiddl.SyncBatchNorm.convert(module) if synced else module
    model = mpiddl.DataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = convolutions(norm=True).to(world.device)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    everyones = [images_of(rank, world) for rank in range(world.size)]
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, world.rank, world).backward()
        optimizer.step()
        reference.zero_grad()
        images, labels = (torch.cat(parts) for parts in zip(*everyones, strict=True))
        cross_entropy(alone(images), labels).backward()
        reference.step()
    mpiddl.replicas.check(model, buffers=True)
    if synced:
        for (name, tensor), want in zip(
            model.state_dict().items(), alone.state_dict().values(), strict=True
        ):
            agree(torch.allclose(tensor, want, rtol=1e-3, atol=1e-4), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_grad_scaler(world, agree, dtype):
    """The last rank's gradient overflows in one step, which all ranks leave out."""
    model = mpiddl.DataParallel(convolutions().to(world.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = loss_of(model, world.rank, world)
        if step == 2 and world.rank == world.size - 1:
            loss = loss * float("inf")
        before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        now = torch.nn.utils.parameters_to_vector(model.parameters())
        agree(torch.equal(before, now) == (step == 2), f"step {step}")
        mpiddl.replicas.check(model)
    agree(scaler.get_scale() == 512.0, scaler.get_scale())


def test_gradients_as_bfloat16_on_the_wire(world, agree):
    model = mpiddl.DataParallel(convolutions().to(world.device), bucket_size="16KiB")
    model.strategy.use_codec(BF16())
    want = mean_gradients(convolutions, world)
    for _ in range(3):
        model.zero_grad()
        loss_of(model, world.rank, world).backward()
        for parameter, mean in zip(model.parameters(), want, strict=True):
            bits = parameter.grad
            agree(torch.equal(bits, bits.bfloat16().float()), "not rounded")
            size = float(mean.abs().max())
            agree(float((bits - mean).abs().max()) <= 0.05 * size)


def test_a_captured_backward_is_refused_and_one_under_no_sync_is_not(world, agree):
    make = MODELS["embedding"]
    model = mpiddl.DataParallel(make().to(world.device))
    images, labels = images_of(world.rank, world)
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()

    def backward():
        mse_loss(model(images), targets).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), model.no_sync():  # as torch's notes on graphs ask for
        for _ in range(3):
            model.zero_grad()
            backward()
    torch.cuda.current_stream().wait_stream(stream)
    want = [parameter.grad.clone() for parameter in model.parameters()]

    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    with model.no_sync(), torch.cuda.graph(graph):
        backward()
    static = [parameter.grad for parameter in model.parameters()]
    for _ in range(2):
        for gradient in static:
            gradient.fill_(99)
        graph.replay()
        agree(all(map(torch.allclose, static, want)))
        means = [gradient.clone() for gradient in static]
        for gradient in means:  # what a user of graphs does in place of backward's exchange
            mpiddl.all_reduce(gradient, "mean")

    model.zero_grad()
    with (
        pytest.raises(UnsupportedBufferError, match=r"no_sync\(\)"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        backward()
    torch.cuda.current_stream().synchronize()
    model.zero_grad()
    backward()
    pairs = zip(model.parameters(), means, strict=True)
    agree(all(torch.allclose(p.grad, mean, rtol=1e-4, atol=1e-6) for p, mean in pairs))


def test_the_state_of_an_optimizer_after_uneven_batches(world, agree):
    """join() copies it from the rank that trained last; it is larger than a chunk."""
    torch.manual_seed(4)
    model = mpiddl.DataParallel(nn.Linear(1024, 1500).to(world.device))
    optimizer = torch.optim.Adam(model.parameters())
    random = torch.Generator().manual_seed(world.rank)
    with mpiddl.join(model, optimizers=[optimizer]):
        for _ in range(world.rank + 1):
            optimizer.zero_grad()
            x = torch.randn(4, 1024, generator=random).to(world.device)
            model(x).square().mean().backward()
            optimizer.step()
    mpiddl.replicas.check(model)
    first = next(iter(optimizer.state.values()))
    agree(first["exp_avg"].device == world.device and int(first["step"]) == world.size, first)
    sums = mpiddl.gather_json(float(first["exp_avg"].double().sum()))
    agree(len(set(sums)) == 1, sums)
