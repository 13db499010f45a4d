"""``mpiddl doctor``: what is this node, and what would break training on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpiddl.cli.run import let_rank_0_speak

if TYPE_CHECKING:
    from mpiddl.comm.world import World
    from mpiddl.doctor.findings import Trap

__all__ = ["doctor"]

_TRIED = ("cuda_aware", "cuda_aware_reason")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    probe: Annotated[
        bool,
        typer.Option(
            help="Where nothing tells whether MPI reads GPU memory, try it in child processes."
        ),
    ] = True,
) -> None:
    """Show MPI, launcher, cores, network, torch and CUDA, and known traps with their fixes.

    Works alone and under mpirun or srun. Exits 1 if something would break training.
    """
    from mpiddl.api.objects import gather_json
    from mpiddl.comm.world import init
    from mpiddl.doctor.environment import rank_facts
    from mpiddl.doctor.findings import by_node
    from mpiddl.doctor.traps import Trap, find_traps
    from mpiddl.errors import LaunchError, SettingsError
    from mpiddl.launch.exit import LeaveTogether
    from mpiddl.launch.launchers import read_launch

    launch = read_launch()
    world: World | None = None
    broken: list[Trap] = []
    try:
        world = init()
    except LaunchError as error:
        broken = [Trap("error", *_split(str(error)))]
    except SettingsError as error:
        broken = [Trap("error", str(error), "unset or correct the variable")]

    facts = [rank_facts(None)] if world is None else gather_json(rank_facts(world, probe))
    for ranks in by_node(facts).values():  # one rank of a node has tried it for all
        for rank in ranks[1:]:
            rank["mpi"] |= {name: ranks[0]["mpi"][name] for name in _TRIED}
    traps = broken + find_traps(facts)
    copies = None
    if world is not None and _all_on_gpus(facts):
        copies, trap = _copies(world)
        traps += trap
    if world is not None:
        traps += _start(world)
    if launch.is_first if world is None else world.rank == 0:
        report = {
            "launcher": launch.launcher,
            "announced_ranks": launch.size,
            "ranks": facts,
            "gpu_copies": copies,
            "traps": [trap._asdict() for trap in traps],
        }
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _show(report)
    if any(trap.severity == "error" for trap in traps):
        let_rank_0_speak()
        raise LeaveTogether(1)


def _all_on_gpus(facts: list[dict[str, Any]]) -> bool:
    """Whether every rank has a GPU, and what works on it."""
    return all(rank["gpu"]["device"] is not None and rank["gpu"]["cupy"] for rank in facts)


def _copies(world: World) -> tuple[list[dict[str, Any]] | None, list[Trap]]:
    """Bandwidth between the GPUs of each node's ranks, and what it means that there is none.
    Collective."""
    from mpiddl.bench.gpu_memory import peer_bandwidth
    from mpiddl.doctor.findings import Trap

    copies = peer_bandwidth(world)
    if copies is not None or world.num_nodes == world.size:
        return copies, []
    return None, [
        Trap(
            "warning",
            "the ranks of a node cannot map each other's GPU memory (CUDA IPC): gradients travel "
            "as messages within the node too",
            "let every rank see all GPUs of its node (Slurm: --gpu-bind=none, no "
            "--gpus-per-task); in a container share the host's IPC namespace (--ipc=host)",
        )
    ]


def _start(world: World) -> list[Trap]:
    """What may go wrong while MPI starts. Collective."""
    from mpiddl.doctor.fences import empty_fence_waits
    from mpiddl.doctor.findings import Trap

    if empty_fence_waits(world) is not False:
        return []
    return [
        Trap(
            "note",
            "fences of this Slurm's PMIx do not wait for other nodes: a rank that leaves MPI_Init "
            "early, and sends, can crash Open MPI 5 in one that is late. mpiddl.init() waits by "
            "itself; a program that sends MPI messages before does not",
            "export SLURM_PMIX_FENCE=ring before srun, or PMIxCollFence=ring in every node's "
            "mpi.conf",
        )
    ]


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
        (
            "torch",
            f"{versions['torch']}, {gpu['torch_threads']} thread(s) a rank "
            f"({facts['threads_rule']})",
        ),
        ("network", ", ".join(interfaces) or "loopback only"),
        *_gpu_rows(gpu),
        ("GPU to GPU", _rates(report["gpu_copies"])),
        ("UCX", _ucx(mpi["ucx"]) if mpi else "-"),
        ("CUDA-aware", f"{mpi['cuda_aware']} ({mpi['cuda_aware_reason']})" if mpi else "unknown"),
    ]


def _gpu_rows(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    cupy = gpu["cupy"] or "not installed"
    if gpu["cupy_cuda"]:
        cupy += f" (CUDA {gpu['cupy_cuda']})"
    nccl = [f"{name} {gpu[f'{name}_nccl']}" for name in ("torch", "cupy") if gpu[f"{name}_nccl"]]
    newest = f", CUDA up to {gpu['driver_cuda']}" if gpu["driver_cuda"] else ""
    return [
        ("CUDA", f"torch built for {gpu['torch_cuda'] or 'CPU'}, CuPy {cupy}"),
        ("driver", f"{gpu['driver']}{newest}" if gpu["driver"] else "none"),
        ("GPUs", "\n".join(map(_device, range(99), gpu["devices"])) or "none"),
        ("NCCL", ", ".join(nccl).replace("cupy", "CuPy") or "none"),
    ]


def _rates(copies: list[dict[str, Any]] | None) -> str:
    """Of the first node, a line for each rank."""
    lines = []
    for rank in copies or []:
        if rank["node_rank"] == 0:
            from_peers = [
                f"{gbps:.1f} from {peer}"
                for peer, gbps in enumerate(rank["from_gbps"])
                if gbps is not None
            ]
            lines.append(f"rank {rank['local_rank']}: {', '.join(from_peers)} GB/s")
    return "\n".join(lines) or "not measured"


def _device(index: int, device: dict[str, Any]) -> str:
    from mpiddl.base.units import format_bytes

    memory = format_bytes(device["memory_bytes"] >> 20 << 20)
    place = f", PCI {device['pci']}" if device["pci"] else ""
    return f"{index}: {device['name']}, {memory}{place}, {device['uuid'] or 'UUID unknown'}"


def _ucx(ucx: dict[str, Any] | None) -> str:
    if ucx is None:
        return "not loaded"
    loaded = "loaded" if ucx["cuda"] else "not loaded"
    return f"{ucx['version']}, CUDA transports {loaded}, {ucx['path']}"


def _listed(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items()) or "nothing"


def _rank_table(ranks: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("rank", "host", "local rank", "may run on cores", "torch threads", title="")
    has_gpus = any(rank["gpu"]["devices"] for rank in ranks)
    if has_gpus:
        table.add_column("GPU")
        table.add_column("visible GPUs")
    for facts in ranks:
        place, gpu = facts["place"], facts["gpu"]
        cells = [place["rank"], facts["hostname"], place["local_rank"], _ranges(facts["cores"])]
        cells.append(gpu["torch_threads"])
        if has_gpus:
            cells += ["none" if gpu["device"] is None else gpu["device"], _visible(gpu)]
        table.add_row(*map(str, cells))
    return table


def _visible(gpu: dict[str, Any]) -> str:
    """As CUDA_VISIBLE_DEVICES says it."""
    return f"all {len(gpu['devices'])}" if gpu["visible"] is None else gpu["visible"] or "none"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)
