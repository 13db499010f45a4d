"""Known traps, found in the facts of all ranks. Each says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mpiddl.base.units import format_bytes
from mpiddl.doctor.environment import VIRTUAL_INTERFACE
from mpiddl.doctor.findings import Facts, Trap, by_node
from mpiddl.doctor.gpu_traps import GPU_FINDERS

__all__ = ["Trap", "find_traps"]

LEAST_SHARED_MEMORY = 256 << 20


def find_traps(facts: Facts) -> list[Trap]:
    """All traps of a job, worst first.

    Args:
        facts: Of every rank, in rank order.
    """
    found = [trap for finder in _FINDERS for trap in finder(facts)]
    return sorted(found, key=lambda trap: ("error", "warning", "note").index(trap.severity))


def _different_software(facts: Facts) -> Iterator[Trap]:
    for name in facts[0]["versions"]:
        versions = [rank["versions"][name] for rank in facts]
        if len(set(versions)) > 1:
            yield Trap(
                "error",
                f"ranks run different versions of {name}: {sorted(set(map(str, versions)))}",
                "use one virtual environment on all nodes, on a shared file system",
            )
    libraries = {rank["mpi"]["library"] for rank in facts if rank["mpi"]}
    if len(libraries) > 1:
        yield Trap("error", f"ranks loaded different MPIs: {sorted(libraries)}", "load one module")


def _crowded_cores(facts: Facts) -> Iterator[Trap]:
    for hostname, ranks in by_node(facts).items():
        cores = sorted({core for rank in ranks for core in rank["cores"]})
        if len(ranks) > len(cores):
            yield Trap(
                "warning",
                f"{len(ranks)} ranks on {hostname} share {len(cores)} cores",
                "start fewer ranks per node, or ask for more cores per rank "
                "(Slurm: --cpus-per-task)",
            )
        elif len(ranks) > 1 and all(rank["cores"] == ranks[0]["cores"] for rank in ranks):
            if len(cores) < ranks[0]["node_cores"]:
                yield Trap(
                    "warning",
                    f"all {len(ranks)} ranks on {hostname} are bound to the same {len(cores)} of "
                    f"{ranks[0]['node_cores']} cores",
                    "mpirun --bind-to none, or --map-by slot:PE=<cores per rank>",
                )
        elif len(cores) < ranks[0]["node_cores"] and len(ranks[0]["cores"]) == 1:
            yield Trap(
                "warning",
                f"each rank on {hostname} is bound to one core; {len(cores)} of "
                f"{ranks[0]['node_cores']} cores are used",
                "mpirun --bind-to none, or --map-by slot:PE=<cores per rank>",
            )


def _unset_threads(facts: Facts) -> Iterator[Trap]:
    crowded = [rank for rank in facts if rank["place"] and rank["place"]["local_size"] > 1]
    if crowded and any(rank["omp_num_threads"] is None for rank in crowded):
        cores = crowded[0]["place"]["own_cores"]
        yield Trap(
            "note",
            f"OMP_NUM_THREADS is unset with {crowded[0]['place']['local_size']} ranks per node; "
            f"mpiddl.init() gives torch {cores} thread(s) a rank, other libraries take all cores",
            f"export OMP_NUM_THREADS={cores}",
        )


def _forking_loaders(facts: Facts) -> Iterator[Trap]:
    if facts[0]["start_method"] == "fork":
        yield Trap(
            "note",
            "DataLoader workers are forked by default here, and a fork can corrupt MPI",
            "DataLoader(..., num_workers=n, multiprocessing_context='forkserver')",
        )


def _thread_level(facts: Facts) -> Iterator[Trap]:
    level = facts[0]["mpi"]["thread_level"] if facts[0]["mpi"] else None
    if level is not None and level != "MPI_THREAD_MULTIPLE":
        yield Trap(
            "note",
            f"this MPI grants {level} only: collectives are driven inline, not by a thread",
            "nothing to do on CPUs; else an MPI built with thread support",
        )


def _shared_memory(facts: Facts) -> Iterator[Trap]:
    for hostname, ranks in by_node(facts).items():
        free = ranks[0]["shared_memory_bytes"]
        if free is not None and free < LEAST_SHARED_MEMORY:
            yield Trap(
                "warning",
                f"{format_bytes(free)} of shared memory left on {hostname} (/dev/shm)",
                "remove stale files there; start a container with --shm-size=8g or --ipc=host",
            )


def _virtual_interfaces(facts: Facts) -> Iterator[Trap]:
    nodes = by_node(facts)
    names = {
        interface["name"]
        for ranks in nodes.values()
        for interface in ranks[0]["interfaces"]
        if VIRTUAL_INTERFACE.match(interface["name"])
    }
    if len(nodes) > 1 and names:
        listed = ",".join(sorted(names))
        yield Trap(
            "warning",
            f"virtual network interfaces ({listed}) exist on several nodes; an MPI over TCP may "
            "pick one that leads nowhere, and hang",
            f"export OMPI_MCA_btl_tcp_if_exclude=lo,{listed} (MPICH: MPIR_CVAR_NETWORK_IFACE)",
        )


def _small_messages(facts: Facts) -> Iterator[Trap]:
    mpi, place = facts[0]["mpi"], facts[0]["place"]
    if mpi is None or len(by_node(facts)) == 1 or not mpi["library"].startswith("Open MPI"):
        return
    limit = mpi["tcp_eager_bytes"] or ""
    if limit.isdigit() and int(limit) < place["chunk_bytes"]:
        yield Trap(
            "note",
            f"OMPI_MCA_btl_tcp_eager_limit={limit} is less than a chunk "
            f"({format_bytes(place['chunk_bytes'])}): over TCP every chunk waits for an answer",
            "unset it, if the nodes are joined by TCP: mpiddl sets it to fit its default chunks",
        )


_FINDERS: tuple[Callable[[Facts], Iterator[Trap]], ...] = (
    _different_software,
    _crowded_cores,
    _unset_threads,
    _forking_loaders,
    _thread_level,
    _shared_memory,
    _virtual_interfaces,
    _small_messages,
    *GPU_FINDERS,
)
