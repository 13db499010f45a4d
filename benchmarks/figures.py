"""The figures of docs/how-it-works.md, drawn from traces of trainings across hosts made here.

    sudo python benchmarks/figures.py

docs/figures/ring.png: one bucket on its way round a ring of three.
docs/figures/overlap.png: a step of two ranks whose link is busy while backward computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpiddl.trace.chrome import merge, read_folder, read_trace
from mpiddl.trace.timeline import choose_steps, plot_timeline

HERE = Path(__file__).parent
FIGURES = HERE.parent / "docs" / "figures"
COLOURS = ("#2a6f97", "#f4a300", "#8ab17d")
HOSTS = {"ring": 3, "overlap": 2}
STEPS = 12


def train(what: str) -> None:
    """On every rank: what the figure shows."""
    import torch

    import mpiddl

    world = mpiddl.init()
    torch.set_num_threads(1)
    torch.manual_seed(world.rank)
    if what == "ring":
        layers, batch, options = [torch.nn.Linear(1024, 1536)], 16, {"bucket_size": "16MiB"}
    else:
        layers = [torch.nn.Linear(1024, 1024) for _ in range(16)]
        batch, options = 2048, {"engine": "inline"}
    model = mpiddl.DataParallel(torch.nn.Sequential(*layers), algorithm="ring", **options)
    inputs = torch.randn(batch, 1024)
    for _ in range(STEPS):
        model.zero_grad()
        mpiddl.barrier()
        model(inputs).square().mean().backward()


def trace_of(what: str, folder: Path) -> Path:
    """Train in the lab; its merged trace."""
    events, merged = folder / what, folder / f"{what}.json"
    lab = [sys.executable, str(HERE / "lab"), "--hosts", str(HOSTS[what]), "--rate", "1gbit"]
    program = ["env", f"MPIDDL_TRACE={events}", "python", str(Path(__file__).resolve())]
    subprocess.run([*lab, "--", *program, "--train", what], check=True)
    merged.write_text(json.dumps(merge(read_folder(events))))
    return merged


def draw_ring(merged: Path, picture: Path) -> None:
    """One exchange: what each rank sends when, a colour for each segment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    events = json.loads(merged.read_text())["traceEvents"]
    ranks = sorted({event["pid"] for event in events})
    exchanges = [_sends_of(events, rank) for rank in ranks]
    start = min(exchange[0][0] for exchange in exchanges)
    figure, axes = pyplot.subplots(figsize=(12, 3.6), layout="constrained")
    for rank, (posted, end) in zip(ranks, exchanges, strict=True):
        chunks = len(posted) // (2 * (len(ranks) - 1))  # of a segment
        for turn, at in enumerate(posted):
            step = turn // chunks
            segment = (rank - step) % len(ranks)
            until = posted[turn + 1] if turn + 1 < len(posted) else end
            place = ((at - start) / 1e3, (until - at) / 1e3)
            shade = 1.0 if step < len(ranks) - 1 else 0.45
            axes.broken_barh(
                [place], (rank - 0.35, 0.7), facecolors=COLOURS[segment], alpha=shade, edgecolor="w"
            )
            if turn % chunks == 0:
                axes.text(place[0] + 0.1, rank, "abc"[segment], va="center", fontsize=12)
    axes.set_yticks(ranks, [f"rank {rank} sends" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("ms since the first chunk; a bar begins where a chunk is handed to the network")
    axes.set_title(
        "One bucket on a ring of three hosts, 1 Gbit/s: each segment (a colour) moves on by one "
        "rank per step;\nfull colours are partial sums (reduce-scatter), pale ones are complete "
        "(all-gather)",
        fontsize=11,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(picture, dpi=130)


def _sends_of(events: Sequence[Mapping[str, Any]], rank: int) -> tuple[list[float], float]:
    """When ``rank`` sent the chunks of a late exchange, and when that was over; microseconds."""
    mine = [event for event in events if event["pid"] == rank]
    flights = [event for event in mine if event["name"] == "in flight"]
    largest = max(flight["args"]["nbytes"] for flight in flights)
    flight = [flight for flight in flights if flight["args"]["nbytes"] == largest][-3]
    begin, end = flight["ts"], flight["ts"] + flight["dur"]
    chunks = [e for e in mine if e["name"] == "chunk" and e["tid"] == flight["tid"]]
    return [chunk["ts"] for chunk in chunks if begin <= chunk["ts"] <= end], end


def main() -> None:
    """Draw both, or train for one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", choices=HOSTS, help=argparse.SUPPRESS)
    what = parser.parse_args().train
    if what:
        train(what)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_ring(trace_of("ring", Path(folder)), FIGURES / "ring.png")
        steps = choose_steps(read_trace(trace_of("overlap", Path(folder))))
        plot_timeline(FIGURES / "overlap.png", steps)


if __name__ == "__main__":
    main()
