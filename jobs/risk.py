"""Score risks from a table: how likely each row is of the rare class.

    mpirun -n 2 python jobs/risk.py --out runs/risk
    mpirun -n 2 python jobs/risk.py --data patients.csv --label outcome --positive died

Without ``--data`` it is scikit-learn's breast-cancer data (UCI "Breast Cancer Wisconsin
(Diagnostic)"): 569 tumours, 30 features, 37 % malignant. After 2 s on 2 ranks the area under the
ROC curve (AUC) is above 0.98 on the test set. Classes are uneven, so training, validation and test
set, each rank's shard and each batch have both in their proportion, and the loss weights the
positive one by how much rarer it is.

A CSV file has a line of names and rows of numbers; ``--label`` names the column of the two classes.
model.safetensors holds the features' means and deviations too; scores.csv has a line for each row
of the test set. What mpiddl needs is marked (1) to (6).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy
import torch
import typer
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import Subset, TensorDataset

import mpiddl
from mpiddl import job

PARTS = (0.7, 0.15, 0.15)  # training, validation, test
LARGEST = 1e18  # value whose square float32 can hold


@dataclass
class Flags(job.Flags):
    """Of every job, and this one's own."""

    out: Path = Path("runs/risk")
    epochs: int = 30
    batch_size: int = 32
    data: Annotated[Path | None, typer.Option(help="CSV file; default breast cancer.")] = None
    label: Annotated[str, typer.Option(help="Its column of classes.")] = "label"
    positive: Annotated[
        str | None, typer.Option(help="The class that is the risk; default the rarer one.")
    ] = None
    hidden: Annotated[int, typer.Option(min=1, help="Units of the hidden layer.")] = 32


class Rows(NamedTuple):
    """A table.

    Attributes:
        features: float32, (rows, columns).
        labels: 1 where the risk came true, int64, (rows,).
        positive: What that class is called.
        parts: Rows of training, validation and test set.
    """

    features: torch.Tensor
    labels: NDArray[numpy.int64]
    positive: str
    parts: tuple[NDArray[numpy.int64], ...]


def load(flags: Flags) -> Rows:
    """The table, split into parts that have the same share of both classes."""
    values, codes, classes = read(flags)
    if len(classes) != 2:
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(f"{flags.label!r} must have two classes, it has {len(classes)}: {some}")
    positive = flags.positive or classes[int(codes.mean() <= 0.5)]
    if positive not in classes:
        raise ValueError(f"--positive {positive}: the classes are {' and '.join(classes)}")
    labels = (codes == classes.index(positive)).astype(numpy.int64)
    parts = mpiddl.data.split(len(labels), PARTS, labels=labels, seed=flags.seed)
    if not all(0 < labels[part].mean() < 1 for part in parts):
        raise ValueError(
            f"{labels.sum()} rows of class {positive} in {len(labels)} are too few: training, "
            "validation and test set need both classes"
        )
    return Rows(torch.tensor(values, dtype=torch.float32), labels, positive, parts)


def read(flags: Flags) -> tuple[NDArray[numpy.float64], NDArray[numpy.int64], list[str]]:
    """Numbers, (rows, columns); each row's class, as its place in the list of their names."""
    if flags.data is None:
        from sklearn.datasets import load_breast_cancer

        raw = load_breast_cancer()
        return raw.data, raw.target.astype(numpy.int64), [str(name) for name in raw.target_names]
    table = mpiddl.data.read_csv(flags.data, label=flags.label)
    if not len(table.names):
        raise ValueError(f"{flags.data} has no column but {flags.label!r}")
    unusable = ~(numpy.abs(table.values) < LARGEST)  # NaN too
    if unusable.any():
        row, column = numpy.argwhere(unusable)[0]
        raise ValueError(
            f"{flags.data}: {table.names[column]!r} is {table.values[row, column]:g} in row "
            f"{row + 1} after the header; fill in what is missing, or drop the row"
        )
    return table.values, table.labels, list(table.classes)


class RiskModel(nn.Module):
    """Standardises the features and scores them: the logarithm of the odds, (n,)."""

    def __init__(self, features: torch.Tensor, hidden: int) -> None:
        super().__init__()
        # Buffers, so that whoever loads the model can feed it with raw numbers.
        self.register_buffer("mean", features.mean(0))
        deviation = features.std(0)
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, 1.0))
        self.layers = nn.Sequential(
            nn.Linear(features.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers((features - self.mean) / self.deviation).squeeze(1)


@torch.no_grad()
def evaluate(
    model: nn.Module, rows: Subset, world: mpiddl.World
) -> tuple[dict[str, float], torch.Tensor]:
    """Over all these rows, each on one of the ranks: metrics, and every row's risk in 0..1."""
    model.eval()
    auc, matrix = mpiddl.data.AUC(), mpiddl.data.ConfusionMatrix(2)
    mine, scores = mpiddl.ShardSampler(rows, world), [torch.empty(0)]
    for batch in mpiddl.data.loader(rows, sampler=mine, batch_size=256):
        features, labels = (tensor.to(world.device) for tensor in batch)
        risk = model(features).sigmoid()
        auc.update(risk, labels)
        matrix.update((risk > 0.5).long(), labels)
        scores.append(risk.cpu())
    (right, alarms), (missed, found) = matrix.compute().tolist()
    metrics = {
        "AUC": auc.compute(),
        "sensitivity": found / (missed + found),
        "specificity": right / (right + alarms),
    }
    return metrics, mpiddl.data.gather_predictions(list(mine), torch.cat(scores), len(rows))


def write_scores(path: Path, rows: Rows, risks: torch.Tensor, world: mpiddl.World) -> None:
    """A line for each row of the test set; rows are counted from 0."""
    if world.rank == 0:
        test = rows.parts[2]
        lines = zip(test, rows.labels[test], risks.tolist(), strict=True)
        text = "".join(f"{row},{label},{risk:.6f}\n" for row, label, risk in lines)
        path.write_text(f"row,label,risk\n{text}")


def main(flags: Flags) -> None:
    """Score risks from a table, data-parallel over all ranks."""
    world = mpiddl.init()  # (1) rank, size, device

    rows = mpiddl.data.everywhere(load, flags)  # a bad file: the same error on every rank
    train, check, test = rows.parts
    samples = TensorDataset(rows.features, torch.tensor(rows.labels))
    mpiddl.seed(flags.seed)  # the same weights everywhere
    model = mpiddl.DataParallel(  # (2)
        RiskModel(rows.features[train], flags.hidden).to(world.device),
        bucket_size=flags.bucket_size,
        algorithm=flags.algorithm,
        broadcast_buffers=False,  # they never change
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=0.01)
    batches = mpiddl.ShardBatchSampler(  # (3)
        Subset(samples, train),
        world,
        batch_size=flags.batch_size,
        seed=flags.seed,
        sharding="stratified",
        labels=rows.labels[train],
    )
    loader = mpiddl.data.loader(Subset(samples, train), batches=batches)
    ones = rows.labels[train].mean()
    weight = torch.tensor((1 - ones) / ones, dtype=torch.float32, device=world.device)

    if world.rank == 0:
        print(f"{len(train)} rows to train on, {ones:.1%} {rows.positive}, {world.size} ranks")
    # (5) Checkpoints, --resume, an epoch's line, metrics.jsonl, curves
    run = job.Run(flags, world, model=model, optimizer=optimizer, batches=batches)
    for _ in run.epochs():
        model.train()
        for batch in loader:
            features, labels = (tensor.to(world.device) for tensor in batch)
            optimizer.zero_grad()
            # (4) Weight gradients by true sample counts: a batch may not divide by the ranks
            with model.batch(local=len(labels), total=batches.total):
                loss = binary_cross_entropy_with_logits(
                    model(features), labels.float(), pos_weight=weight
                )
                loss.backward()
            optimizer.step()
            run.step(len(labels), loss=loss)
        run.epoch_ends(**evaluate(model, Subset(samples, check), world)[0])
    run.finish("Risk")  # (6) all ranks hold the same bits; writes the model

    metrics, risks = evaluate(model, Subset(samples, test), world)
    if world.rank == 0:
        print(", ".join(f"test {name} {value:.4f}" for name, value in metrics.items()))
    mpiddl.data.everywhere(write_scores, flags.out / "scores.csv", rows, risks, world)


if __name__ == "__main__":
    job.start(main, Flags)
