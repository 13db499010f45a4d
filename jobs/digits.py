"""Train a small CNN on 1,797 real handwritten digits, on every rank that mpirun started.

    mpirun -n 2 python jobs/digits.py --epochs 20 --batch-size 64 --out runs/digits

The images ship with scikit-learn (UCI "Optical Recognition of Handwritten Digits"), so nothing
is downloaded. Copy this file as a start for a job of your own: what mpiddl needs is marked (1)
to (6); the rest is what the same program would do on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import mpiddl
from mpiddl import job

HELD_OUT = 360  # test images, about a fifth


def load_digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set; the same split on every rank."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16  # (n, 1, 8, 8) in 0..1
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def make_model() -> nn.Module:
    """Two convolutions and a hidden layer: 0.3 million parameters, in several buckets."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 256),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(256, 10),
    )


@torch.no_grad()
def evaluate(model: nn.Module, test: TensorDataset, world: mpiddl.World) -> float:
    """Accuracy over the whole test set: every image counts exactly once, on one of the ranks."""
    model.eval()
    mine = mpiddl.ShardSampler(test, world)
    device = next(model.parameters()).device
    correct = torch.zeros(1, dtype=torch.int64, device=device)
    for batch in mpiddl.data.loader(test, sampler=mine, batch_size=256):
        images, labels = (tensor.to(device) for tensor in batch)
        correct += (model(images).argmax(1) == labels).sum()
    mpiddl.all_reduce(correct, op="sum")
    return correct.item() / len(test)


@dataclass
class Flags(job.Flags):
    """Of every job; another default or two."""

    out: Path = Path("runs/digits")


def main(flags: Flags) -> None:
    """Train a small CNN on the UCI handwritten digits, data-parallel over all ranks."""
    world = mpiddl.init()  # (1) rank, size, device

    train, test = load_digits(flags.seed)
    mpiddl.seed(flags.seed)  # the same weights everywhere ...
    model = mpiddl.DataParallel(  # (2)
        make_model().to(world.device), bucket_size=flags.bucket_size, algorithm=flags.algorithm
    )
    mpiddl.seed(flags.seed, rank=world.rank)  # ... and other dropout on each rank
    optimizer = torch.optim.Adam(model.parameters(), lr=flags.lr)
    batches = mpiddl.ShardBatchSampler(  # (3)
        train, world, batch_size=flags.batch_size, seed=flags.seed
    )
    loader = mpiddl.data.loader(train, batches=batches)

    if world.rank == 0:
        print(f"{len(train)} training images, {len(test)} test images, {world.size} ranks")
    # (5) Checkpoints, --resume, an epoch's line, metrics.jsonl, curves
    run = job.Run(flags, world, model=model, optimizer=optimizer, batches=batches)
    for _ in run.epochs():
        model.train()
        for batch in loader:
            images, labels = (tensor.to(world.device) for tensor in batch)
            optimizer.zero_grad()
            # (4) Weight gradients by true sample counts: the last batch may not divide by the ranks
            with model.batch(local=len(labels), total=batches.total):
                scores = model(images)
                loss = cross_entropy(scores, labels)
                loss.backward()
            optimizer.step()
            correct = (scores.argmax(1) == labels).double().mean()
            run.step(len(labels), loss=loss, train_accuracy=correct)
        run.epoch_ends(test_accuracy=evaluate(model, test, world))
    run.finish("Handwritten digits")  # (6) all ranks hold the same bits; writes the model


if __name__ == "__main__":
    job.start(main, Flags)
