"""Recommend items to users: matrix factorisation, with sparse or dense gradients of embeddings.

    mpirun -n 2 python jobs/recommender.py --out runs/recommender
    mpirun -n 2 python jobs/recommender.py --data ml-100k/u.data
    mpirun -n 4 python jobs/recommender.py --compare --users 50000 --items 20000

``--data`` is a file in the format of MovieLens' u.data: user, item, rating and timestamp, with
tabs between. Nothing is downloaded: without it 30,000 ratings of 200 items by 300 users are made
from 8 hidden properties of each, and noise of deviation 0.5. That is the floor: no model can have a
smaller error (RMSE) on the test set. On 2 ranks it is below 0.58 after 10 s.

A batch touches few rows of an embedding. ``--sparse`` (the default) exchanges these alone,
``--dense`` whole tables; results are the same, within rounding. ``--compare`` times some steps of
both and shows the bytes that each sends. What mpiddl needs is marked (1) to (6).
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import numpy
import torch
import typer
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Subset, TensorDataset

import mpiddl
from mpiddl import job

HIDDEN = 8  # properties, in generated ratings


@dataclass
class Flags(job.Flags):
    """Of every job, and this one's own."""

    out: Path = Path("runs/recommender")
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.5
    data: Annotated[Path | None, typer.Option(help="As u.data; default generated.")] = None
    users: Annotated[int, typer.Option(min=1, help="Generated.")] = 300
    items: Annotated[int, typer.Option(min=1, help="Generated.")] = 200
    ratings: Annotated[int, typer.Option(min=10, help="Generated.")] = 30_000
    noise: Annotated[float, typer.Option(min=0, help="Deviation, in generated ratings.")] = 0.5
    dim: Annotated[int, typer.Option(min=1, help="Length of the embeddings.")] = HIDDEN
    l2: Annotated[float, typer.Option(min=0, help="Weight of the embeddings' squares.")] = 0.01
    sparse: Annotated[
        bool, typer.Option("--sparse/--dense", help="Exchange rows of embeddings, or all.")
    ] = True
    compare: Annotated[bool, typer.Option("--compare", help="Time both, and train no more.")] = (
        False
    )
    steps: Annotated[int, typer.Option(min=2, help="That --compare times.")] = 50


class Ratings(NamedTuple):
    """Users and items are numbered from 0."""

    users: NDArray[numpy.int64]
    items: NDArray[numpy.int64]
    ratings: NDArray[numpy.float32]
    num_users: int
    num_items: int

    def mean_of(self, part: Subset) -> float:
        return float(self.ratings[part.indices].mean())


def generated(flags: Flags) -> Ratings:
    """Products of hidden properties, and noise; the same on every rank."""
    random = numpy.random.default_rng(flags.seed)
    users = random.integers(flags.users, size=flags.ratings)
    items = random.integers(flags.items, size=flags.ratings)
    of_users = random.normal(size=(flags.users, HIDDEN))
    of_items = random.normal(size=(flags.items, HIDDEN)) / math.sqrt(HIDDEN)
    noise = random.normal(scale=flags.noise, size=flags.ratings)
    ratings = 3 + (of_users[users] * of_items[items]).sum(1) + noise
    return Ratings(users, items, ratings.astype(numpy.float32), flags.users, flags.items)


def read_ratings(path: Path) -> Ratings:
    """A file like u.data; users and items may have any whole numbers."""
    try:
        with open(path, encoding="utf-8") as lines, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is in it: told below
            table = numpy.loadtxt(lines, delimiter="\t", comments=None, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} is no table of numbers with tabs between: {error}") from None
    if len(table) < 10 or table.shape[1] < 3:
        raise ValueError(
            f"{path} has {table.shape[0]} lines of {table.shape[1]} numbers; user, item and rating "
            "are needed, in ten lines at least"
        )
    if not numpy.isfinite(table[:, :3]).all() or (table[:, :2] % 1).any():
        raise ValueError(f"{path}: users and items must be whole numbers, and ratings finite")
    users, items = (numpy.unique(table[:, at], return_inverse=True)[1] for at in (0, 1))
    ratings = table[:, 2].astype(numpy.float32)
    return Ratings(users, items, ratings, int(users.max()) + 1, int(items.max()) + 1)


class Factors(nn.Module):
    """A rating is the mean, what is usual for user and item, and how well these two match."""

    def __init__(self, users: int, items: int, mean: float, dim: int, sparse: bool) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.users = nn.Embedding(users, dim + 1, sparse=sparse)  # the last is the bias
        self.items = nn.Embedding(items, dim + 1, sparse=sparse)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(
        self, users: torch.Tensor, items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted ratings, and the squares of what they were made from; (n,) both."""
        of_users, of_items = self.users(users), self.items(items)
        match = (of_users[:, :-1] * of_items[:, :-1]).sum(1)
        predicted = self.mean + of_users[:, -1] + of_items[:, -1] + match
        return predicted, of_users.square().sum(1) + of_items.square().sum(1)


def make_model(
    flags: Flags, data: Ratings, mean: float, world: mpiddl.World
) -> mpiddl.DataParallel:
    mpiddl.seed(flags.seed)  # the same weights everywhere
    model = Factors(data.num_users, data.num_items, mean, flags.dim, flags.sparse)
    return mpiddl.DataParallel(  # (2)
        model.to(world.device), bucket_size=flags.bucket_size, algorithm=flags.algorithm
    )


def train_step(
    model: mpiddl.DataParallel,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, ...],
    total: int,
    l2: float,
) -> torch.Tensor:
    """Returns: the mean squared error on this rank's part of the batch."""
    users, items, ratings = batch
    optimizer.zero_grad()
    # (4) Weight gradients by true sample counts: the last batch may not divide by the ranks
    with model.batch(local=len(ratings), total=total):
        predicted, squares = model(users, items)
        error = (predicted - ratings).square().mean()
        (error + l2 * squares.mean()).backward()
    optimizer.step()  # Adagrad leaves rows without a gradient alone, sparse or dense
    return error


@torch.no_grad()
def rmse_of(model: nn.Module, test: Subset, world: mpiddl.World) -> float:
    """Over all test ratings, each on one of the ranks."""
    error, mine = mpiddl.data.Mean(), mpiddl.ShardSampler(test, world)
    for batch in mpiddl.data.loader(test, sampler=mine, batch_size=1024):
        users, items, ratings = (tensor.to(world.device) for tensor in batch)
        predicted, _ = model(users, items)
        error.update((predicted - ratings).square().mean(), len(ratings))
    return math.sqrt(error.compute())


def bytes_sent(model: mpiddl.DataParallel, batch: tuple[torch.Tensor, ...], size: int) -> float:
    """By a rank in one step: its rows and their numbers to each other rank; of what is dense, the
    two times (n-1)/n that an all-reduce needs."""
    dense = sum(bucket.nbytes for bucket in model.stats().buckets) * 2 * (size - 1) / size
    tables = [(model.users, batch[0]), (model.items, batch[1])]
    row_bytes = 8 + 4 * model.users.embedding_dim
    rows = sum(len(rows.unique()) for table, rows in tables if table.sparse)
    return dense + rows * row_bytes * (size - 1)


def compare(flags: Flags, data: Ratings, train: Subset, test: Subset, world: mpiddl.World) -> None:
    """Some steps with sparse gradients, and the same with dense ones."""
    if world.rank == 0:
        print(f"{data.num_users} users, {data.num_items} items, {world.size} ranks")
        print("gradients   ms/step   KiB/step sent by a rank   test RMSE")
    for kind, sparse in ("sparse", True), ("dense", False):
        model = make_model(replace(flags, sparse=sparse), data, data.mean_of(train), world)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=flags.lr)
        batches = mpiddl.ShardBatchSampler(
            train, world, batch_size=flags.batch_size, seed=flags.seed
        )
        loader = mpiddl.data.loader(train, batches=batches)
        seconds, sent = list[float](), list[float]()
        while len(seconds) < flags.steps:
            batches.set_epoch(batches.epoch + 1)
            for batch in islice(loader, flags.steps - len(seconds)):
                here = tuple(tensor.to(world.device) for tensor in batch)
                began = time.perf_counter()
                train_step(model, optimizer, here, batches.total, flags.l2).item()
                seconds.append(time.perf_counter() - began)
                sent.append(bytes_sent(model, here, world.size))
        rmse = rmse_of(model, test, world)
        if world.rank == 0:
            milliseconds, kib = median(seconds) * 1e3, median(sent) / 1024
            print(f"{kind:9}  {milliseconds:8.2f}  {kib:24.1f}  {rmse:10.4f}", flush=True)


def main(flags: Flags) -> None:
    """Factorise a matrix of ratings, data-parallel over all ranks."""
    world = mpiddl.init()  # (1) rank, size, device
    torch.sparse.check_sparse_tensor_invariants.disable()  # else torch warns that they are

    # A bad file: the same error on every rank.
    data = mpiddl.data.everywhere(read_ratings, flags.data) if flags.data else generated(flags)
    samples = TensorDataset(*map(torch.from_numpy, data[:3]))
    parts = mpiddl.data.split(len(samples), (0.9, 0.1), seed=flags.seed)
    train, test = (Subset(samples, part) for part in parts)
    if flags.compare:
        compare(flags, data, train, test, world)
        return
    model = make_model(flags, data, data.mean_of(train), world)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=flags.lr)
    batches = mpiddl.ShardBatchSampler(  # (3)
        train, world, batch_size=flags.batch_size, seed=flags.seed
    )
    loader = mpiddl.data.loader(train, batches=batches)

    if world.rank == 0:
        print(f"{data.num_users} users, {data.num_items} items, {len(train)} ratings to train on")
    # (5) Checkpoints, --resume, an epoch's line, metrics.jsonl, curves
    run = job.Run(flags, world, model=model, optimizer=optimizer, batches=batches)
    for _ in run.epochs():
        for batch in loader:
            here = tuple(tensor.to(world.device) for tensor in batch)
            error = train_step(model, optimizer, here, batches.total, flags.l2)
            run.step(len(here[0]), squared_error=error)
        run.epoch_ends(test_rmse=rmse_of(model, test, world))
    run.finish("Ratings")  # (6) all ranks hold the same bits; writes the model


if __name__ == "__main__":
    job.start(main, Flags)
