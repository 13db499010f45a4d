"""Exchange and backward at the same time, over slow links."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpiddl.observe.event_files import read
from mpiddl.observe.events import Event
from mpiddl.trace.spans import spans_of, steps_of

TRAIN = """
import sys, torch, mpiddl
world = mpiddl.init()
torch.manual_seed(0)
layers = [torch.nn.Linear(512, 512) for _ in range(8)]
model = mpiddl.DataParallel(
    torch.nn.Sequential(*layers), engine=sys.argv[2], bucket_size="1MiB", trace=sys.argv[1]
)
inputs = torch.ones(4096, 512)
for step in range(8):
    mpiddl.barrier()
    model.zero_grad()
    model(inputs).sum().backward()
"""


def hidden_shares(folder):
    """Of every step of every rank but the first ones."""
    shares = []
    for path in sorted(Path(folder).glob("rank-*.events")):
        recording = read(path)
        events = [Event(*event) for event in recording.events.tolist()]
        steps = steps_of(spans_of(events, recording.about))
        assert len(steps) == 8
        shares += [step.hidden_share for step in steps[3:]]
    return sorted(shares)


@pytest.mark.parametrize("engine", ["thread", "after"])
def test_most_bytes_fly_before_backward_ends(lab, tmp_path, engine):
    """Eight buckets of 1 MiB take 70 ms on the wire, backward takes several times as long."""
    options = ["--hosts", "2", "--rate", "1gbit"]
    job = lab(options, "python", "-c", TRAIN, str(tmp_path), engine, env={"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.stderr

    shares = hidden_shares(tmp_path)
    median = shares[len(shares) // 2]
    if engine == "after":  # nothing can, so this test would see it
        assert median < 0.5, shares
    else:
        assert median >= 0.5, shares
