"""The models that `mpiddl bench overlap` trains, and made-up data for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DEFAULTS", "USUAL", "ModelSpec", "batches", "build", "loss_of", "nbytes_of"]

MODEL_SEED = 0
DATA_SEED = 1000
"""Plus the rank: every rank has samples of its own."""
_UNCOUNTED = 2**63 - 1
IMAGE, CLASSES, TOKENS, HEAD_WIDTH = 32, 10, 512, 64


@dataclass(frozen=True)
class ModelSpec:
    """A model and how much of it.

    Attributes:
        name: One of ``DEFAULTS``.
        width: Features of a layer; of the CNN, channels of its first stage.
        layers: Linear layers; stages of two convolutions, each with twice the channels of the one
            before and half its height and width; transformer blocks.
        batch: Samples of one rank.
        context: Tokens of a sample; of the transformer only.
    """

    name: str
    width: int
    layers: int
    batch: int
    context: int = 0

    as_dict = dataclasses.asdict


DEFAULTS = {
    spec.name: spec
    for spec in (
        ModelSpec("mlp", width=2048, layers=6, batch=64),
        ModelSpec("cnn", width=64, layers=3, batch=16),
        ModelSpec("transformer", width=256, layers=4, batch=8, context=64),
        ModelSpec("transformer-large", width=768, layers=14, batch=8, context=256),
    )
}
USUAL = {"cpu": "mlp,cnn,transformer", "cuda": "mlp,cnn,transformer-large"}
"""What is trained unless the user says more; the large one has 100 million parameters."""


class _Transformer(nn.Module):
    """A small language model."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, spec.width)
        self.places = nn.Parameter(torch.zeros(spec.context, spec.width))
        heads = spec.width // HEAD_WIDTH if spec.width % HEAD_WIDTH == 0 else 1
        block = nn.TransformerEncoderLayer(
            spec.width, heads, 4 * spec.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, spec.layers, enable_nested_tensor=False)
        self.head = nn.Linear(spec.width, TOKENS)
        mask = nn.Transformer.generate_square_subsequent_mask(spec.context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.places
        logits: Tensor = self.head(self.blocks(hidden, mask=self.mask, is_causal=True))
        return logits.flatten(0, 1)


def _mlp(spec: ModelSpec) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(spec.layers):
        layers += [nn.Linear(spec.width, spec.width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _cnn(spec: ModelSpec) -> nn.Module:
    """Without BatchNorm: each rank has statistics of its own, and libraries differ there."""
    layers: list[nn.Module] = []
    channels, side = 3, IMAGE
    for stage in range(spec.layers):
        wider = spec.width << stage
        for inputs in (channels, wider):
            layers += [nn.Conv2d(inputs, wider, 3, padding=1), nn.ReLU()]
        channels = wider
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    hidden = 8 * spec.width
    layers += [nn.Flatten(), nn.Linear(channels * side * side, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, CLASSES))


def build(spec: ModelSpec) -> nn.Module:
    """The model, in host memory, with the same parameters wherever it is built."""
    make = {"mlp": _mlp, "cnn": _cnn}.get(spec.name, _Transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        return make(spec)


def nbytes_of(spec: ModelSpec) -> int:
    """Size of all parameters; none of them is allocated."""
    try:
        with torch.device("meta"):
            return sum(each.nbytes for each in build(spec).parameters())
    except (RuntimeError, OverflowError, TypeError):  # torch cannot even count them
        return _UNCOUNTED


def batches(
    spec: ModelSpec, rank: int, count: int, device: str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches of inputs and targets, the same whenever and wherever this rank asks."""
    random = torch.Generator().manual_seed(DATA_SEED + rank)
    drawn = [_batch(spec, random) for _ in range(count)]
    return [(inputs.to(device), targets.to(device)) for inputs, targets in drawn]


def _batch(spec: ModelSpec, random: torch.Generator) -> tuple[Tensor, Tensor]:
    if spec.name == "mlp":
        inputs, targets = torch.randn((2, spec.batch, spec.width), generator=random)
        return inputs, targets
    if spec.name == "cnn":
        images = torch.randn((spec.batch, 3, IMAGE, IMAGE), generator=random)
        return images, torch.randint(CLASSES, (spec.batch,), generator=random)
    text = torch.randint(TOKENS, (spec.batch, spec.context + 1), generator=random)
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


def loss_of(spec: ModelSpec, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over this rank's samples."""
    if spec.name == "mlp":
        return (outputs - targets).square().sum(1).mean()
    return nn.functional.cross_entropy(outputs, targets)
