"""Tell the class of a text from its words, with a bag of words or a small transformer.

    mpirun -n 2 python jobs/textclass.py --out runs/textclass
    mpirun -n 2 python jobs/textclass.py --model transformer --out runs/transformer
    mpirun -n 2 python jobs/textclass.py --data mails    # mails/ham/*.txt, mails/spam/*.txt

Without --data the texts are docstrings of Python's standard library, and the class is the package
they are from, one of eight; the largest has 18% of them. Of those that it was not shown a bag of
words gets 83% right, or 79% with another --seed, a transformer 73%; in 10 and 20 seconds on two
ranks. Classes have the numbers of their names in alphabetical order.
What mpiddl needs is marked (1) to (6); the rest is what the same program would do on one rank.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, TensorDataset

import mpiddl
from mpiddl import job

PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)

PADDING, BEGIN = 0, 1
"""What is no word: after a text's end, and what even an empty text begins with."""


def docstrings(package: Path) -> Iterator[str]:
    """All in the source of a package, which is read and not imported; without its tests."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(package.rglob("*.py")):
        if "test" not in path.relative_to(package).parts:
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, documented) and (text := ast.get_docstring(node)):
                    yield text


def read_texts(folder: Path | None) -> dict[str, list[str]]:
    """The texts of each class."""
    if folder is None:
        library = Path(sysconfig.get_path("stdlib"))
        return {name: list(docstrings(library / name)) for name in PACKAGES}
    classes = [path for path in sorted(folder.glob("*")) if path.is_dir()]
    if len(classes) < 2:
        raise ValueError(f"{folder} must have a folder with .txt files for each class")
    return {
        path.name: ["\n".join(mpiddl.data.TextLines(file)) for file in sorted(path.glob("*.txt"))]
        for path in classes
    }


def numbers_of(text: str, flags: Flags) -> list[int]:
    """One for each word, made from its letters: no table of words is needed."""
    words = re.findall(r"[^\W\d_]+", text.lower())[: flags.words - 1]
    others = flags.vocabulary - 2
    numbers = [BEGIN, *(2 + zlib.crc32(word.encode()) % others for word in words)]
    return numbers + [PADDING] * (flags.words - len(numbers))


def prepare(flags: Flags) -> tuple[tuple[str, ...], Subset, Subset]:
    """Classes, and texts to train and to test with; the same on every rank."""
    if flags.width % flags.heads:
        raise ValueError(f"--width {flags.width} cannot be shared by --heads {flags.heads}")
    texts = read_texts(flags.data)
    for name, of_class in texts.items():
        if not of_class:
            raise ValueError(f"there is no text of class {name}: see --data in --help")
    classes = tuple(texts)
    class_of = {text: number for number, name in enumerate(classes) for text in texts[name]}
    labels = torch.tensor(list(class_of.values()))  # a text that comes twice counts once
    samples = TensorDataset(torch.tensor([numbers_of(text, flags) for text in class_of]), labels)
    parts = mpiddl.data.split(samples, (0.8, 0.2), labels=labels, seed=flags.seed)
    train, test = (Subset(samples, part.tolist()) for part in parts)
    return classes, train, test


class Bag(nn.Module):
    """Scores of each class from the mean of the words' vectors."""

    def __init__(self, num_classes: int, flags: Flags) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(flags.vocabulary, flags.width, padding_idx=PADDING)
        self.scores = nn.Linear(flags.width, num_classes)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.scores(self.mean(words))


class Transformer(nn.Module):
    """Scores of each class from the mean of vectors that attention has mixed."""

    def __init__(self, num_classes: int, flags: Flags) -> None:
        super().__init__()
        self.vectors = nn.Embedding(flags.vocabulary, flags.width, padding_idx=PADDING)
        self.places = nn.Embedding(flags.words, flags.width)
        layer = nn.TransformerEncoderLayer(
            flags.width, flags.heads, 4 * flags.width, dropout=0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, flags.layers, enable_nested_tensor=False)
        self.scores = nn.Linear(flags.width, num_classes)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        padding = words == PADDING
        mixed = self.layers(self.vectors(words) + self.places.weight, src_key_padding_mask=padding)
        mixed = mixed.masked_fill(padding.unsqueeze(-1), 0)
        return self.scores(mixed.sum(1) / (~padding).sum(1, keepdim=True))


class Kind(str, Enum):
    """Of model."""

    bag = "bag"
    transformer = "transformer"


@torch.no_grad()
def evaluate(model: nn.Module, test: Subset, world: mpiddl.World) -> float:
    """Accuracy over the whole test set: every text counts exactly once, on one of the ranks."""
    model.eval()
    accuracy = mpiddl.data.Accuracy()
    mine = mpiddl.ShardSampler(test, world)
    for batch in mpiddl.data.loader(test, sampler=mine, batch_size=256):
        words, labels = (tensor.to(world.device) for tensor in batch)
        accuracy.update(model(words), labels)
    return accuracy.compute()


@dataclass
class Flags(job.Flags):
    """Of every job, and of this one."""

    out: Path = Path("runs/textclass")
    epochs: int = 10
    batch_size: int = 32
    lr: float = 5e-3
    data: Annotated[
        Path | None,
        typer.Option(help="Has a folder of .txt files for each class; without it: docstrings."),
    ] = None
    model: Annotated[Kind, typer.Option(help="What reads the words.")] = Kind.bag
    words: Annotated[int, typer.Option(min=2, help="Of a text, that are read.")] = 64
    vocabulary: Annotated[int, typer.Option(min=3, help="Numbers that words can have.")] = 4096
    width: Annotated[int, typer.Option(min=1, help="Length of a word's vector.")] = 64
    layers: Annotated[int, typer.Option(min=1, help="Of the transformer.")] = 1
    heads: Annotated[int, typer.Option(min=1, help="Of attention; they share the width.")] = 4


def main(flags: Flags) -> None:
    """Train a classifier of texts, data-parallel over all ranks."""
    world = mpiddl.init()  # (1) rank, size, device

    classes, train, test = mpiddl.data.everywhere(prepare, flags)
    mpiddl.seed(flags.seed)  # the same weights everywhere
    kind = {Kind.bag: Bag, Kind.transformer: Transformer}[flags.model]
    model = mpiddl.DataParallel(  # (2)
        kind(len(classes), flags).to(world.device),
        bucket_size=flags.bucket_size,
        algorithm=flags.algorithm,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr)
    batches = mpiddl.ShardBatchSampler(  # (3)
        train, world, batch_size=flags.batch_size, seed=flags.seed
    )
    loader = mpiddl.data.loader(train, batches=batches)

    if world.rank == 0:
        print(f"{len(train)} texts to train, {len(test)} to test, {world.size} ranks; classes:")
        print(", ".join(classes))
    # (5) Checkpoints, --resume, an epoch's line, metrics.jsonl, curves
    run = job.Run(flags, world, model=model, optimizer=optimizer, batches=batches)
    for _ in run.epochs():
        model.train()
        for batch in loader:
            words, labels = (tensor.to(world.device) for tensor in batch)
            optimizer.zero_grad()
            # (4) Weight gradients by true counts: the last batch may not divide by the ranks
            with model.batch(local=len(labels), total=batches.total):
                loss = cross_entropy(model(words), labels)
                loss.backward()
            optimizer.step()
            run.step(len(labels), loss=loss)
        run.epoch_ends(test_accuracy=evaluate(model, test, world))
    run.finish("Texts")  # (6) all ranks hold the same bits; writes the model


if __name__ == "__main__":
    job.start(main, Flags)
