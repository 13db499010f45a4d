"""mpiddl's ring against gloo, taking turns on the ranks of one job. One JSON line.

    sudo python benchmarks/lab --hosts 4 --rate 200mbit -- python benchmarks/lab/compare.py

Settings are the environment's: MPIDDL_CHUNK_SIZE, OMPI_MCA_btl_tcp_links and their kin.
busbw as in nccl-tests: bytes / time x 2(n-1)/n; MB = 1e6 bytes.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.distributed
import typer

import mpiddl
from mpiddl.cli.run import run
from mpiddl.units import parse_bytes

SETTINGS = ("MPIDDL_CHUNK_SIZE", "OMPI_MCA_pml", "OMPI_MCA_btl_tcp_")
ADDRESS = "tcp://host1:29500"


def _ring(buffer: torch.Tensor) -> None:
    mpiddl.all_reduce(buffer, algorithm="ring")


def _gloo(buffer: torch.Tensor) -> None:
    torch.distributed.all_reduce(buffer)


def _seconds(reduce: Callable[[torch.Tensor], None], length: int, world: mpiddl.World) -> float:
    """One checked all-reduce; the slowest rank counts."""
    buffer = torch.full((length,), float(world.rank + 1))
    mpiddl.barrier()
    started = time.perf_counter()
    reduce(buffer)
    seconds = time.perf_counter() - started
    if not torch.all(buffer == world.size * (world.size + 1) / 2):
        raise RuntimeError(f"wrong sum on rank {world.rank}")
    return float(mpiddl.all_reduce(torch.tensor([seconds]), op="max"))


def main(
    sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "4MiB,16MiB",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 7,
    with_gloo: Annotated[bool, typer.Option("--gloo/--no-gloo")] = True,
) -> None:
    """Print busbw in MB/s."""
    world = mpiddl.init()
    ways = {"ring": _ring}
    if with_gloo:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "eth0")
        torch.distributed.init_process_group(
            "gloo", init_method=ADDRESS, rank=world.rank, world_size=world.size
        )
        ways["gloo"] = _gloo
    busbw: dict[str, dict[str, float]] = {}
    for size in sizes.split(","):
        nbytes = parse_bytes(size) // 4 * 4
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats + 1):
            for way, reduce in ways.items():
                times[way].append(_seconds(reduce, nbytes // 4, world))
        sent = nbytes * 2 * (world.size - 1) / world.size / 1e6
        busbw[size] = {
            way: round(sent / statistics.median(seconds[1:]), 2)  # one to warm up
            for way, seconds in times.items()
        }
    chosen = {name: text for name, text in os.environ.items() if name.startswith(SETTINGS)}
    if world.rank == 0:
        print(json.dumps({"ranks": world.size, "settings": chosen, "busbw": busbw}), flush=True)
    if with_gloo:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
