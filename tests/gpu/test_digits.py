"""jobs/digits.py on the GPU learns what it learns on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import mpiddl

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))

EPOCHS = 3


def losses(world, device):
    import digits

    train, test = digits.load_digits(0)
    mpiddl.seed(0)
    module = digits.make_model()
    for layer in module:
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # its random numbers are the device's own
    model = mpiddl.DataParallel(module.to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = mpiddl.ShardBatchSampler(train, world, batch_size=64, seed=0)
    loader = DataLoader(train, batch_sampler=batches, collate_fn=batches.collate)
    rows = []
    for epoch in range(1, EPOCHS + 1):
        batches.set_epoch(epoch)
        rows.append(digits.train_epoch(model, optimizer, loader, batches))
    accuracy = digits.evaluate(model, test, world)
    mpiddl.replicas.check(model)
    return [row["loss"] for row in rows], accuracy


def test_the_same_losses_as_on_the_cpu(world, agree):
    pytest.importorskip("sklearn")
    want, accuracy = losses(world, torch.device("cpu"))
    got, found = losses(world, world.device)
    agree(got == pytest.approx(want, rel=5e-3), f"{got}, on the CPU {want}")
    agree(abs(found - accuracy) < 0.02, f"{found}, on the CPU {accuracy}")
