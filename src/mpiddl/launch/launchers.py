"""What mpirun, srun and their kin put in the environment, read before MPI is started.

Needed early: the number of ranks on this node decides settings that MPI reads when it loads,
usage errors are printed by one rank only, and a job whose launcher and MPI library do not
belong together must be recognised (every process would train alone, in silence).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mpiddl.errors import SingletonError

__all__ = [
    "Launch",
    "gpu_binding",
    "has_slurms_pmix",
    "read_launch",
    "refuse_launcher_without_mpi",
    "refuse_singleton",
    "without_launcher",
]


@dataclass(frozen=True)
class Launch:
    """What the launcher announced; ``None`` where it says nothing.

    Attributes:
        starts_mpi: Whether MPI knows the processes that this launcher starts.
    """

    launcher: str | None = None
    rank: int | None = None
    size: int | None = None
    local_rank: int | None = None
    local_size: int | None = None
    starts_mpi: bool = True

    @property
    def is_first(self) -> bool:
        """Whether this process should speak for the job before MPI is up."""
        return self.rank in (None, 0)


@dataclass(frozen=True)
class _Variables:
    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str


# The order matters. mpirun inside an sbatch script sees Slurm's variables too, and they describe
# the allocation, so Slurm comes last. Its own SLURM_NTASKS is set in every salloc and sbatch
# shell; SLURM_STEP_NUM_TASKS only where srun started the process.
_LAUNCHERS = (
    _Variables(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables(
        "MVAPICH's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables(
        "MVAPICH's mpirun",
        "MVP_COMM_WORLD_RANK",
        "MVP_COMM_WORLD_SIZE",
        "MVP_COMM_WORLD_LOCAL_RANK",
        "MVP_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables("mpiexec (PMI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Variables("PALS", "PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Variables("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    _Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)


# Those of torch.distributed, and of Horovod on gloo. torchrun says so, and accelerate starts it;
# deepspeed and others are known by the address at which their processes are to meet, which a user
# may also set for processes of mpirun.
_TORCHRUN = _Variables("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MARK_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"
_WITHOUT_MPI = {
    "MASTER_ADDR": replace(_TORCHRUN, launcher="a launcher of torch.distributed"),
    "HOROVOD_RANK": _Variables(
        "horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"
    ),
}


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of ``names`` that holds a whole number."""
    for name in names:
        text = environ.get(name, "")
        if text.isdigit():
            return int(text)
    return None


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Rank, size, local rank and local size as the launcher announced them.

    A plain ``python script.py`` in an sbatch or salloc shell is no launch: nothing announced.
    """
    if _MARK_OF_TORCHRUN in environ:  # srun or mpirun may have started torchrun, once a node
        return _without_mpi(environ, _TORCHRUN)
    for names in _LAUNCHERS:
        rank, size = _number(environ, names.rank), _number(environ, names.size)
        if rank is None or (size is None and names.launcher == "srun"):
            continue
        # A PMI server (srun --mpi=pmi2, Flux, PALS) may set PMI_RANK and leave the local rank to
        # the launcher around it.
        local = (names.local_rank, *(other.local_rank for other in _LAUNCHERS))
        by_slurm = "SLURM_STEP_NUM_TASKS" in environ and names.local_rank not in environ
        return Launch(
            launcher="srun" if by_slurm else names.launcher,
            rank=rank,
            size=size,
            local_rank=_number(environ, *local),
            local_size=_number(environ, names.local_size, "MPI_LOCALNRANKS"),
        )
    for mark, names in _WITHOUT_MPI.items():
        if mark in environ and _number(environ, names.rank) is not None:
            return _without_mpi(environ, names)
    return Launch()


def _without_mpi(environ: Mapping[str, str], names: _Variables) -> Launch:
    return Launch(
        launcher=names.launcher,
        rank=_number(environ, names.rank),
        size=_number(environ, names.size),
        local_rank=_number(environ, names.local_rank),
        local_size=_number(environ, names.local_size),
        starts_mpi=False,
    )


# What launchers tell a process about the job that it is in, and users a launcher about where to
# start what. The rest is left: users' settings of the MPI, permission to run as root, prefixes of
# an Open MPI that was moved.
_OF_THE_JOB = re.compile(
    r"OMPI_(?!MCA_|ALLOW_RUN_AS_ROOT|MPI_|PREFIX)"
    r"|OMPI_MCA_(orte|ess|plm|ras|rmaps|odls|routed|pmix|hwloc_base|schizo|initial_wdir"
    r"|num_procs|cpu_type|PREFIXES|mpi_oversubscribe|shmem_RUNTIME)"
    r"|OPAL_USER_PARAMS_GIVEN|PRTE_(?!MCA_|ALLOW_RUN_AS_ROOT|PREFIX)"
    r"|PMIX_(?!MCA_|PREFIX|INSTALL_PREFIX)|PMI_|PMI2_|MPI_LOCAL|MPIEXEC_|HYDI_|HYDRA_"
    r"|I_MPI_(HYDRA|INFO|INTERNAL|PIN_INFO|PIN_MAPPING|PMI|MPIRUN|JOB|PERHOST|ROOT_PROCS)"
    r"|MV2_COMM_WORLD_|MVP_COMM_WORLD_|MPISPAWN_"
    r"|SLURM|SRUN_|PALS_|FLUX_|PBS_|LSB_|COBALT_|ALPS_|PE_HOSTFILE$"
    r"|TORCHELASTIC_|HOROVOD_|(LOCAL_)?(RANK|WORLD_SIZE)$"
)


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as it was before a launcher started this process, as far as one can tell.

    Another MPI job can be started in it; in ``environ`` itself its processes would report to this
    job's launcher.
    """
    return {name: text for name, text in environ.items() if not _OF_THE_JOB.match(name)}


def gpu_binding(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Slurm option by which each rank may see GPUs of its own only; None if there is none."""
    bind, number = environ.get("SLURM_GPU_BIND", ""), environ.get("SLURM_GPUS_PER_TASK", "")
    if bind == "none" or not (bind or number):
        return None
    return f"--gpu-bind={bind}" if bind else f"--gpus-per-task={number}"


def has_slurms_pmix(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `srun --mpi=pmix` started this process."""
    return environ.get("PMIX_NAMESPACE", "").startswith("slurm.pmix")


def refuse_launcher_without_mpi(launch: Launch) -> None:
    """Stop a job whose launcher starts processes of which MPI does not know, before MPI starts.

    Raises:
        SingletonError: There are several of them.
    """
    if not launch.starts_mpi and (launch.size or 1) > 1:
        raise SingletonError(
            launch.launcher or "",
            launch.size or 1,
            "MPI",
            f"Start it with `mpirun -n {launch.size} python ...`, or with `srun --mpi=pmix -n "
            f"{launch.size} python ...` under Slurm: torchrun, accelerate, deepspeed and their kin "
            "start no MPI.",
        )


def refuse_singleton(launch: Launch, world_size: int, library: str) -> None:
    """Stop a job in which every process would train alone.

    Args:
        launch: What the launcher announced.
        world_size: Size of MPI_COMM_WORLD.
        library: Name and version of the MPI library that was loaded.

    Raises:
        SingletonError: The launcher announced several ranks and MPI found one.
    """
    if world_size == 1 and launch.launcher is not None and (launch.size or 1) > 1:
        remedy = _right_command(launch.launcher, library, launch.size or 1)
        raise SingletonError(launch.launcher, launch.size or 1, library, remedy)


def _right_command(launcher: str, library: str, size: int) -> str:
    is_open_mpi = "Open MPI" in library
    if launcher == "srun":
        plugin = "pmix" if is_open_mpi else "pmi2"
        return (
            f"Start it with `srun --mpi={plugin} -n {size} python ...` (`srun --mpi=list` shows "
            f"what this Slurm offers), or with `mpirun -n {size} python ...` inside sbatch."
        )
    program = "mpirun" if is_open_mpi else "mpiexec"
    family = library.split(" v")[0].split(" Version")[0]
    return (
        f"Start it with the {program} that belongs to {family}: `{program} -n {size} python ...` "
        "(its full path, if several are installed), or load the launcher's own MPI library "
        "(MPI4PY_LIBMPI=/path/to/libmpi.so). `mpiddl doctor` shows both."
    )
