"""The page about a gradient's way names the files in the order in which a gradient enters them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import mpiddl

TOP = Path(__file__).parents[2]
SOURCES = TOP / "src" / "mpiddl"


@pytest.fixture
def files_of_the_page():
    text = (TOP / "docs" / "how-it-works.md").read_text()
    section = text.split("## A gradient's way")[1].split("\n## ")[0]
    return re.findall(r"^ *\d+\. \[[^]]*\]\(\.\./src/mpiddl/([^)]+)\)", section, re.MULTILINE)


@pytest.mark.host
def test_the_page_follows_the_gradient(world, agree, files_of_the_page):
    if world.size == 1 or world.num_nodes > 1:
        pytest.skip("the page describes ranks of one node")
    layer = torch.nn.Linear(300, 300, bias=False)
    model = mpiddl.DataParallel(layer, algorithm="auto", engine="inline")
    model(torch.ones(2, 300)).sum().backward()  # which measures, and plans anew
    loss = model(torch.ones(2, 300)).sum()
    entered = []

    def note(frame, event, _argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCES):
            entered.append(str(path.relative_to(SOURCES)))

    sys.setprofile(note)
    try:
        loss.backward()
    finally:
        sys.setprofile(None)
    order = [name for name in dict.fromkeys(entered) if name in files_of_the_page]
    agree(len(files_of_the_page) == 10)
    agree(order == files_of_the_page, order)


def test_the_naive_strategy_computes_the_same(world, agree):
    """It is the oracle: each rank weighs as many samples as it has, and one has none."""
    if world.size == 1:
        pytest.skip("one rank has all samples")
    found = []
    for strategy in (None, mpiddl.strategies.Naive()):
        torch.manual_seed(0)
        layers = torch.nn.Linear(5, 300), torch.nn.Tanh(), torch.nn.Linear(300, 2)
        model = mpiddl.DataParallel(torch.nn.Sequential(*layers).double(), strategy=strategy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            samples = (world.rank + step) % world.size
            inputs = torch.arange(5.0 * samples, dtype=torch.float64).view(samples, 5).sin() + step
            optimizer.zero_grad()
            with model.batch(local=samples, total=sum(range(world.size))):
                if samples:
                    model(inputs).square().mean().backward()
            optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    agree(all(map(torch.allclose, *found)), "the default differs from the naive strategy")
