"""Train a small GPT on a text, one character at a time, and let it write.

    mpirun -n 2 python jobs/charlm.py --out runs/charlm
    mpirun -n 2 python jobs/charlm.py --data book.txt --d-model 256 --layers 6 --lr 1e-3

Without --data the text is Python's help on its own language, which every Python brings along. In
half a minute (two ranks, two cores) its last tenth, which the model was not shown, costs less than
2.4 bits a character; counting which character follows which two gives 2.6, which one 3.4.
What mpiddl needs is marked (1) to (6); the rest is what the same program would do on one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import Dataset

import mpiddl
from mpiddl import job


class Windows(Dataset):
    """Stretches of a text, one after the other, and for each character the one that follows."""

    def __init__(self, codes: torch.Tensor, context: int) -> None:
        self.codes = codes
        self.context = context

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.context

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = number * self.context
        window = self.codes[start : start + self.context + 1]
        return window[:-1], window[1:]


def read_text(path: Path | None) -> str:
    """The text to learn."""
    if path is not None:
        return "\n".join(mpiddl.data.TextLines(path))
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))  # topics quote each other: each only once


def prepare(flags: Flags) -> tuple[str, Windows, Windows]:
    """The alphabet, and windows to train and to test with; the same on every rank."""
    if flags.d_model % flags.heads:
        raise ValueError(f"--d-model {flags.d_model} cannot be shared by --heads {flags.heads}")
    text = read_text(flags.data)
    held_out = len(text) // 10
    if held_out <= flags.context:
        raise ValueError(
            f"a tenth of {len(text)} characters is held out, and must be longer than --context "
            f"{flags.context}: pass a longer text or a smaller --context"
        )
    alphabet = "".join(sorted({*text}))
    code = {character: number for number, character in enumerate(alphabet)}
    codes = torch.tensor([code[character] for character in text])
    train, test = codes[:-held_out], codes[-held_out:]
    return alphabet, Windows(train, flags.context), Windows(test, flags.context)


class Block(nn.Module):
    """Attention to the characters before, and two layers on each; both are added to the input."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.normalised = nn.LayerNorm(d_model)
        # Without a bias: the keys' would have no gradient but rounding, which Adam scales up.
        self.queries_keys_values = nn.Linear(d_model, 3 * d_model, bias=False)
        self.joined = nn.Linear(d_model, d_model)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = self.queries_keys_values(self.normalised(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = projected.transpose(1, 3).unbind(2)  # (batch, heads, context, ...)
        attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.joined(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class GPT(nn.Module):
    """Scores of the character that follows, after each of up to ``context`` characters.

    Source:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    def __init__(self, alphabet: str, flags: Flags) -> None:
        super().__init__()
        # Saved with the weights, which mean nothing without it.
        self.register_buffer("alphabet", torch.tensor([ord(character) for character in alphabet]))
        self.characters = nn.Embedding(len(alphabet), flags.d_model)
        self.places = nn.Embedding(flags.context, flags.d_model)
        blocks = (Block(flags.d_model, flags.heads) for _ in range(flags.layers))
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(flags.d_model))
        self.scores = nn.Linear(flags.d_model, len(alphabet))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.characters(codes) + self.places.weight[: codes.shape[1]]
        return self.scores(self.blocks(x))

    @torch.no_grad()
    def write(self, length: int, seed: int) -> str:
        """A text of the model's own."""
        self.eval()
        chance = torch.Generator().manual_seed(seed)
        written = torch.zeros(1, 1, dtype=torch.int64, device=self.alphabet.device)
        for _ in range(length):
            scores = self(written[:, -len(self.places.weight) :])[:, -1]
            following = scores.softmax(-1).cpu().multinomial(1, generator=chance)
            written = torch.cat([written, following.to(written.device)], dim=1)
        return "".join(chr(character) for character in self.alphabet[written[0, 1:]].tolist())


def loss_of(model: nn.Module, codes: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Mean over all characters of a batch."""
    return cross_entropy(model(codes).flatten(0, 1), following.flatten())


@torch.no_grad()
def bits_per_character(model: nn.Module, test: Windows, world: mpiddl.World) -> float:
    """Mean over the whole test text: every window counts exactly once, on one of the ranks."""
    model.eval()
    loss = mpiddl.data.Mean()
    mine = mpiddl.ShardSampler(test, world)
    for batch in mpiddl.data.loader(test, sampler=mine, batch_size=64):
        codes, following = (tensor.to(world.device) for tensor in batch)
        loss.update(loss_of(model, codes, following), len(codes))
    return loss.compute() / math.log(2)


@dataclass
class Flags(job.Flags):
    """Of every job, and of this one."""

    out: Path = Path("runs/charlm")
    epochs: int = 3
    batch_size: int = 16
    lr: float = 1e-2
    data: Annotated[
        Path | None, typer.Option(help="A text file; without it: Python's help on itself.")
    ] = None
    d_model: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 64
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 2
    heads: Annotated[int, typer.Option(min=1, help="Of attention; they share the width.")] = 4
    context: Annotated[int, typer.Option(min=1, help="Characters that it looks back.")] = 64
    sample: Annotated[int, typer.Option(min=0, help="Characters to write at the end.")] = 300


def main(flags: Flags) -> None:
    """Train a small GPT on the characters of a text, data-parallel over all ranks."""
    world = mpiddl.init()  # (1) rank, size, device

    alphabet, train, test = mpiddl.data.everywhere(prepare, flags)
    mpiddl.seed(flags.seed)  # the same weights everywhere
    model = mpiddl.DataParallel(  # (2)
        GPT(alphabet, flags).to(world.device),
        bucket_size=flags.bucket_size,
        algorithm=flags.algorithm,
        broadcast_buffers=False,  # the alphabet does not change
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr)
    batches = mpiddl.ShardBatchSampler(  # (3)
        train, world, batch_size=flags.batch_size, seed=flags.seed
    )
    loader = mpiddl.data.loader(train, batches=batches)
    steps = flags.epochs * len(batches)
    # Up in the first tenth of all steps, then down to 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0, min(10 * (step + 1) / steps, (1 - step / steps) / 0.9))
    )

    if world.rank == 0:
        seen, unseen = (len(part) * flags.context for part in (train, test))
        print(f"{seen} characters to train, {unseen} to test, {world.size} ranks")
    # (5) Checkpoints, --resume, an epoch's line, metrics.jsonl, curves
    run = job.Run(
        flags, world, model=model, optimizer=optimizer, batches=batches, schedule=schedule
    )
    for _ in run.epochs():
        model.train()
        for batch in loader:
            codes, following = (tensor.to(world.device) for tensor in batch)
            optimizer.zero_grad()
            # (4) Weight gradients by true counts: the last batch may not divide by the ranks
            with model.batch(local=len(codes), total=batches.total):
                loss = loss_of(model, codes, following)
                loss.backward()
            optimizer.step()
            schedule.step()
            run.step(len(codes), loss=loss)
        run.epoch_ends(test_bits=bits_per_character(model, test, world))
    run.finish("Characters")  # (6) all ranks hold the same bits; writes the model
    if world.rank == 0 and flags.sample:
        print(model.module.write(flags.sample, flags.seed))


if __name__ == "__main__":
    job.start(main, Flags)
