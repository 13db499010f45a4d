"""``mpiddl doctor``: what is this node, and what would break training on it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mpiddl.cli.run import let_rank_0_speak

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show MPI, launcher, cores, network, torch and CUDA, and known traps with their fixes.

    Works alone and under mpirun or srun. Exits 1 if something would break training.
    """
    from mpiddl.comm.launchers import read_launch
    from mpiddl.comm.world import World, init
    from mpiddl.errors import LaunchError, SettingsError
    from mpiddl.measure.environment import rank_facts
    from mpiddl.measure.traps import Trap, find_traps
    from mpiddl.overlap.calls import gather_json

    launch = read_launch()
    world: World | None = None
    broken: list[Trap] = []
    try:
        world = init()
    except LaunchError as error:
        broken = [Trap("error", *_split(str(error)))]
    except SettingsError as error:
        broken = [Trap("error", str(error), "unset or correct the variable")]

    facts = [rank_facts(None)] if world is None else gather_json(rank_facts(world))
    traps = broken + find_traps(facts)
    if launch.is_first if world is None else world.rank == 0:
        report = {
            "launcher": launch.launcher,
            "announced_ranks": launch.size,
            "ranks": facts,
            "traps": [trap._asdict() for trap in traps],
        }
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _show(report)
    if any(trap.severity == "error" for trap in traps):
        let_rank_0_speak()
        # Not sys.exit, which ends the job for the sake of ranks that stay behind: all leave here.
        raise SystemExit(1)


def _split(message: str) -> tuple[str, str]:
    """First sentence, and what to do."""
    what, _, fix = message.partition(". ")
    return what, fix


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    facts = report["ranks"][0]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _rows(report, facts):
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    if len(report["ranks"]) > 1:
        console.print(_rank_table(report["ranks"]))
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for trap in report["traps"]:
        colour = colours[trap["severity"]]
        console.print(f"\n[{colour}]{trap['severity']}[/{colour}]: {escape(trap['what'])}")
        console.print(f"  fix: {escape(trap['fix'])}", soft_wrap=True)  # to be copied whole
    if not any(trap["severity"] == "error" for trap in report["traps"]):
        console.print("\n[green]ready to train[/green]")


def _rows(report: dict[str, Any], facts: dict[str, Any]) -> list[tuple[str, str]]:
    mpi, versions, gpu = facts["mpi"], facts["versions"], facts["gpu"]
    cupy = versions["cupy-cuda13x"] or versions["cupy-cuda12x"] or "not installed"
    hosts = {rank["hostname"] for rank in report["ranks"]}
    interfaces = [
        f"{interface['name']} {interface['address']}"
        + (f" {interface['mbit_per_second']} Mbit/s" if interface["mbit_per_second"] else "")
        for interface in facts["interfaces"]
    ]
    return [
        ("mpiddl", f"{versions['mpiddl']}, Python {versions['python']}"),
        ("MPI", f"{mpi['library']}, {mpi['path']}" if mpi else "could not be started"),
        ("threads", f"{mpi['thread_level']}, mpi4py {versions['mpi4py']}" if mpi else "-"),
        ("MPI settings", f"{_listed(mpi['defaults'])}, set by mpiddl" if mpi else "-"),
        ("launcher", report["launcher"] or "none (started alone)"),
        ("ranks", f"{len(report['ranks'])} on {len(hosts)} node(s)"),
        ("torch", f"{versions['torch']}, {gpu['torch_threads']} thread(s) a rank"),
        ("CUDA", f"torch built for {gpu['torch_cuda'] or 'CPU'}, CuPy {cupy}"),
        ("GPUs", ", ".join(gpu["devices"]) or "none"),
        ("driver", gpu["driver"] or "none"),
        ("CUDA-aware", f"{mpi['cuda_aware']} ({mpi['cuda_aware_reason']})" if mpi else "unknown"),
        ("network", ", ".join(interfaces) or "loopback only"),
    ]


def _listed(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items()) or "nothing"


def _rank_table(ranks: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("rank", "host", "local rank", "may run on cores", "torch threads", title="")
    for facts in ranks:
        place = facts["place"]
        cores = _ranges(facts["cores"])
        threads = str(facts["gpu"]["torch_threads"])
        table.add_row(
            str(place["rank"]), facts["hostname"], str(place["local_rank"]), cores, threads
        )
    return table


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)
