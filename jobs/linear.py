"""Linear and softmax regression, held against what they must come to.

    mpirun -n 4 python jobs/linear.py --out runs/linear
    mpirun -n 4 python jobs/linear.py --task softmax --lr 2 --epochs 200 --out runs/softmax

1,000 generated samples of 100 features, in one batch that all ranks share: gradient descent then
comes to the least-squares solution, which numpy knows in closed form. The largest difference of a
weight is printed at the end: below 1e-12 with the default flags, on any number of ranks, in a
second. Softmax regression has no such solution, but at its best its gradient is zero: the second
command brings every element below 1e-5, and gets two thirds of the five classes right.

``--numpy`` does the same without a torch model: gradients by hand, and ``mpiddl.all_reduce`` on
numpy arrays. What mpiddl needs is marked (1) to (6) in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import mpiddl
from mpiddl import job

Array = NDArray[numpy.float64]


class Task(str, Enum):
    """What ``--task`` may be."""

    regression = "regression"
    softmax = "softmax"


@dataclass
class Flags(job.Flags):
    """Of every job, and this one's own."""

    out: Path = Path("runs/linear")
    epochs: int = 100
    batch_size: int = 1000
    lr: float = 0.4
    checkpoint_every: int = 50
    task: Annotated[Task, typer.Option(help="Mean squared error, or classes.")] = Task.regression
    numpy: Annotated[bool, typer.Option("--numpy", help="Gradients by hand, no torch.")] = False
    samples: Annotated[int, typer.Option(min=1, help="Generated.")] = 1000
    features: Annotated[int, typer.Option(min=1, help="Of each sample.")] = 100
    classes: Annotated[int, typer.Option(min=2, help="Of --task softmax.")] = 5


def make_data(flags: Flags) -> tuple[Array, Array]:
    """Inputs and targets, (samples, outputs); classes are one-hot. The same on every rank."""
    random = numpy.random.default_rng(flags.seed)
    inputs = random.normal(size=(flags.samples, flags.features))
    outputs = flags.classes if flags.task is Task.softmax else 1
    scores = inputs @ random.normal(size=(flags.features, outputs)) + random.normal(size=outputs)
    if flags.task is Task.regression:
        return inputs, scores + random.normal(size=scores.shape)
    # Noise by which the largest score is a draw from the softmax of the scores.
    drawn = (0.15 * scores + random.gumbel(size=scores.shape)).argmax(1)
    return inputs, numpy.eye(outputs)[drawn]


# With torch.


def loss_of(task: Task, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over the samples."""
    return (mse_loss if task is Task.regression else cross_entropy)(scores, targets)


def train_with_torch(flags: Flags, world: mpiddl.World, inputs: Array, targets: Array) -> Array:
    """Returns: the weights, (features + 1, outputs); the last row is the bias."""
    x, y = (torch.tensor(array, device=world.device) for array in (inputs, targets))
    model = mpiddl.DataParallel(  # (2) everybody gets rank 0's weights
        nn.Linear(x.shape[1], y.shape[1], dtype=torch.float64, device=world.device),
        bucket_size=flags.bucket_size,
        algorithm=flags.algorithm,
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=flags.lr)
    batches = mpiddl.ShardBatchSampler(  # (3)
        len(x), world, batch_size=flags.batch_size, seed=flags.seed
    )
    # (5) Checkpoints, --resume, an epoch's line, metrics.jsonl, curves
    run = job.Run(flags, world, model=model, optimizer=optimizer, batches=batches)
    for _ in run.epochs():
        for mine in batches:
            optimizer.zero_grad()
            # (4) Weight gradients by true sample counts
            with model.batch(local=len(mine), total=batches.total):
                loss = loss_of(flags.task, model(x[mine]), y[mine])
                loss.backward()
            optimizer.step()
            run.step(len(mine), loss=loss)
        run.epoch_ends()
    run.finish(f"Linear: {flags.task.value}")  # (6)
    weight, bias = (parameter.detach().cpu().numpy() for parameter in model.parameters())
    return numpy.vstack([weight.T, bias])


# Without.


class Weights:
    """What checkpoints ask of a part: its state, and to take one back."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.value = numpy.zeros(shape)

    def state_dict(self) -> dict[str, Array]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["value"].shape != self.value.shape:
            raise ValueError(f"weights of {state['value'].shape}, here {self.value.shape}")
        self.value = state["value"]


def gradient_of(task: Task, weights: Array, x: Array, y: Array) -> tuple[Array, float]:
    """Of the sum of losses over the samples, and that sum."""
    scores = x @ weights
    if task is Task.regression:
        return 2 * x.T @ (scores - y), float(numpy.square(scores - y).sum())
    scores -= scores.max(1, keepdims=True)  # else exp() could overflow
    logs = scores - numpy.log(numpy.exp(scores).sum(1, keepdims=True))
    return x.T @ (numpy.exp(logs) - y), -float((logs * y).sum())


def train_with_numpy(flags: Flags, world: mpiddl.World, inputs: Array, targets: Array) -> Array:
    """As ``train_with_torch``."""
    x = with_ones(inputs)
    weights = Weights((x.shape[1], targets.shape[1]))  # (2) the same on every rank
    batches = mpiddl.ShardBatchSampler(  # (3)
        len(x), world, batch_size=flags.batch_size, seed=flags.seed
    )
    run = job.Run(flags, world, weights=weights, batches=batches)  # (5)
    for _ in run.epochs():
        for mine in batches:
            gradient, loss = gradient_of(flags.task, weights.value, x[mine], targets[mine])
            mpiddl.all_reduce(gradient, algorithm=flags.algorithm)  # (4) sums of all ranks
            weights.value -= flags.lr * gradient / batches.total
            run.step(len(mine), loss=loss / max(1, len(mine)))
        run.epoch_ends()
    run.finish(f"Linear: {flags.task.value}")  # (6)
    return weights.value


def with_ones(inputs: Array) -> Array:
    """The bias is the weight of a feature that is always 1."""
    return numpy.hstack([inputs, numpy.ones((len(inputs), 1))])


def report(flags: Flags, weights: Array, inputs: Array, targets: Array) -> None:
    """Write the weights, and tell how far they are from the best ones."""
    if mpiddl.init().rank != 0:
        return
    numpy.save(flags.out / "weights.npy", weights)
    x = with_ones(inputs)
    if flags.task is Task.regression:
        exact = numpy.linalg.lstsq(x, targets)[0]
        difference = numpy.abs(weights - exact).max()
        print(f"largest difference from the least-squares solution: {difference:.1e}")
        return
    gradient = gradient_of(flags.task, weights, x, targets)[0] / len(x)
    right = ((x @ weights).argmax(1) == targets.argmax(1)).mean()
    print(f"largest element of the gradient: {numpy.abs(gradient).max():.1e}, 0 at the best")
    print(f"right classes: {right:.1%}")


def main(flags: Flags) -> None:
    """Linear or softmax regression, data-parallel over all ranks."""
    world = mpiddl.init()  # (1) rank, size, device
    inputs, targets = make_data(flags)
    if world.rank == 0:
        print(f"{flags.samples} samples of {flags.features} features, {world.size} ranks")
    train = train_with_numpy if flags.numpy else train_with_torch
    weights = train(flags, world, inputs, targets)
    # What rank 0 cannot write is an error on all of them.
    mpiddl.data.everywhere(report, flags, weights, inputs, targets)


if __name__ == "__main__":
    job.start(main, Flags)
