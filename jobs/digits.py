"""Train a small CNN on 1,797 real handwritten digits, on every rank that mpirun started.

    mpirun -n 2 python jobs/digits.py --epochs 20 --batch-size 64 --out runs/digits

The images ship with scikit-learn (UCI "Optical Recognition of Handwritten Digits"), so nothing
is downloaded. Copy this file as a start for a job of your own: what mpiddl needs is marked (1)
to (6); the rest is what the same program would do on one rank.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpiddl
from mpiddl.cli.run import run
from mpiddl.settings import ALGORITHM_NAMES
from mpiddl.units import parse_bytes

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


def train_epoch(
    model: mpiddl.DataParallel,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    batches: mpiddl.ShardBatchSampler,
) -> dict[str, float]:
    """One pass over the training set; means over all ranks."""
    model.train()
    loss_sum = correct = 0.0
    device = next(model.parameters()).device
    started, exposed_before = time.perf_counter(), model.stats().exposed_seconds
    for batch in loader:
        images, labels = (tensor.to(device) for tensor in batch)
        optimizer.zero_grad()
        # (4) Weight gradients by true sample counts: the last batch may not divide by the ranks.
        with model.batch(local=len(labels), total=batches.total):
            scores = model(images)
            loss = cross_entropy(scores, labels)
            loss.backward()
        optimizer.step()
        if len(labels):
            loss_sum += loss.item() * len(labels)
            correct += (scores.argmax(1) == labels).sum().item()
    seconds = time.perf_counter() - started
    exposed = model.stats().exposed_seconds - exposed_before
    # (5) Sums over ranks, divided by what all ranks saw together.
    totals = torch.tensor([loss_sum, correct, exposed / seconds], dtype=torch.float64)
    mpiddl.all_reduce(totals, op="sum")
    return {
        "loss": totals[0].item() / batches.length,
        "train_accuracy": totals[1].item() / batches.length,
        "samples_per_second": batches.length / seconds,
        "exposed_share": totals[2].item() / model.world.size,
    }


@torch.no_grad()
def evaluate(model: nn.Module, test: TensorDataset, world: mpiddl.World) -> float:
    """Accuracy over the whole test set: every image counts exactly once, on one of the ranks."""
    model.eval()
    mine = mpiddl.ShardSampler(test, world)
    device = next(model.parameters()).device
    correct = torch.zeros(1, dtype=torch.int64, device=device)
    for batch in DataLoader(test, batch_size=256, sampler=mine):
        images, labels = (tensor.to(device) for tensor in batch)
        correct += (model(images).argmax(1) == labels).sum()
    mpiddl.all_reduce(correct, op="sum")
    return correct.item() / len(test)


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Loss and test accuracy against epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [row["epoch"] for row in history]
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    left.plot(epochs, [row["loss"] for row in history], "o-", color="tab:blue", markersize=3)
    left.set(xlabel="epoch", yscale="log")
    left.set_ylabel("training loss", color="tab:blue")
    left.xaxis.get_major_locator().set_params(integer=True)
    right = left.twinx()
    right.plot(
        epochs, [row["test_accuracy"] for row in history], "s-", color="tab:orange", markersize=3
    )
    right.set_ylabel("test accuracy", color="tab:orange")
    right.set_ylim(top=1.0)
    left.set_title("Handwritten digits")
    figure.savefig(path, dpi=120)


def _algorithm(name: str | None) -> str | None:
    if name is not None and name not in ALGORITHM_NAMES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(ALGORITHM_NAMES)}")
    return name


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


def _size(text: str | None) -> str | None:
    try:
        if text is not None and parse_bytes(text) < 1:
            raise ValueError("must be positive")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Global: over all ranks.")] = 64,
    lr: Annotated[float, typer.Option(callback=_positive, help="Adam's learning rate.")] = 1e-3,
    algorithm: Annotated[
        str | None,
        typer.Option(
            callback=_algorithm,
            help=f"All-reduce: {', '.join(ALGORITHM_NAMES)}. [default: MPIDDL_ALGORITHM or auto]",
        ),
    ] = None,
    bucket_size: Annotated[
        str | None,
        typer.Option(
            callback=_size,
            help="Largest gradient bucket. [default: MPIDDL_BUCKET_SIZE or 25MiB]",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of split, weights, order, dropout.")
    ] = 0,
    out: Annotated[Path, typer.Option(callback=_writable, help="Folder for results.")] = Path(
        "runs/digits"
    ),
) -> None:
    """Train a small CNN on the UCI handwritten digits, data-parallel over all ranks."""
    world = mpiddl.init()  # (1) rank, size, device

    train, test = load_digits(seed)
    mpiddl.seed(seed)  # the same weights everywhere ...
    model = mpiddl.DataParallel(  # (2)
        make_model().to(world.device), bucket_size=bucket_size, algorithm=algorithm
    )
    mpiddl.seed(seed, rank=world.rank)  # ... and other dropout on each rank
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    batches = mpiddl.ShardBatchSampler(train, world, batch_size=batch_size, seed=seed)  # (3)
    loader = DataLoader(train, batch_sampler=batches, collate_fn=batches.collate)

    if world.rank == 0:
        print(f"{len(train)} training images, {len(test)} test images, {world.size} ranks")
    history: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        batches.set_epoch(epoch)
        row = {"epoch": epoch, **train_epoch(model, optimizer, loader, batches)}
        row["test_accuracy"] = evaluate(model, test, world)
        history.append(row)
        if world.rank == 0:
            write_metrics(history, out)
            print(
                f"epoch {epoch:3d}/{epochs}  loss {row['loss']:.4f}  "
                f"accuracy {row['test_accuracy']:.4f}  "
                f"{row['samples_per_second']:7.0f} samples/s  "
                f"exposed communication {row['exposed_share']:5.1%}",
                flush=True,
            )

    mpiddl.replicas.check(model)  # (6) all ranks hold the same bits
    if world.rank == 0:
        save(model, history, out)
        print(f"test accuracy {history[-1]['test_accuracy']:.4f}, replicas bitwise equal")
        print(f"wrote {out}/metrics.jsonl, model.safetensors and loss.png")


def write_metrics(history: list[dict[str, float]], out: Path) -> None:
    """One JSON object a line and epoch, after every epoch: an interrupted run keeps them."""
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))


def save(model: mpiddl.DataParallel, history: list[dict[str, float]], out: Path) -> None:
    """Weights and a plot, by rank 0."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), out / "model.safetensors")
    plot(history, out / "loss.png")


if __name__ == "__main__":
    run(main)
