"""What each launcher's environment means. The variables are as the launchers set them."""

from __future__ import annotations

import pytest

from mpiddl.collectives.choose import CHUNK_BYTES
from mpiddl.comm.launchers import Launch, read_launch, refuse_singleton
from mpiddl.comm.layout import cores_per_rank
from mpiddl.comm.library import EAGER_BYTES, library_name, set_defaults
from mpiddl.errors import SingletonError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ALLOCATION = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environ", "want"),
    [
        ({}, (None, None, None, None, None)),
        (OPEN_MPI, ("Open MPI's mpirun", 3, 4, 1, 2)),
        (HYDRA, ("mpiexec (PMI)", 3, 4, 1, 2)),
        (STEP, ("srun", 3, 4, 1, None)),
        (ALLOCATION, (None, None, None, None, None)),  # a plain python in an sbatch shell
        ({**ALLOCATION, **OPEN_MPI}, ("Open MPI's mpirun", 3, 4, 1, 2)),
        ({**STEP, **HYDRA}, ("mpiexec (PMI)", 3, 4, 1, 2)),  # mpiexec's proxies run in a step
        # srun --mpi=pmi2 leaves the local rank to Slurm's variable
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, ("srun", 3, 4, 1, None)),
        (
            {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "2", "PALS_SIZE": "8"},
            ("PALS", 5, 8, 2, None),
        ),
        (
            {"FLUX_TASK_RANK": "2", "FLUX_JOB_SIZE": "3", "FLUX_TASK_LOCAL_ID": "0"},
            ("Flux", 2, 3, 0, None),
        ),
        (
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "2",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
                **HYDRA,
            },
            ("MVAPICH's mpirun", 1, 2, 1, 2),
        ),
        ({"PMI_RANK": "garbage"}, (None, None, None, None, None)),
    ],
)
def test_each_launcher(environ, want):
    assert read_launch(environ) == Launch(*want)


@pytest.mark.parametrize(
    ("launch", "library", "command"),
    [
        (Launch("srun", 0, 4), "Open MPI v5.0.11", "srun --mpi=pmix -n 4"),
        (Launch("srun", 0, 4), "MPICH 5.0.2", "srun --mpi=pmi2 -n 4"),
        (Launch("mpiexec (PMI)", 0, 4), "Open MPI v5.0.11", "mpirun -n 4"),
        (Launch("Open MPI's mpirun", 0, 4), "MPICH 5.0.2", "mpiexec -n 4"),
    ],
)
def test_singletons_are_refused(launch, library, command):
    with pytest.raises(SingletonError) as caught:
        refuse_singleton(launch, 1, library)
    message = str(caught.value)
    assert command in message
    assert "4 ranks" in message
    assert library in message


def test_what_is_no_singleton():
    refuse_singleton(Launch(), 1, "")
    refuse_singleton(Launch("srun", 0, 1), 1, "")
    refuse_singleton(Launch("srun", 0, 4), 4, "")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Open MPI v5.0.11, package: Open MPI user@localhost", "Open MPI v5.0.11"),
        ("MPICH Version:      5.0.2\nMPICH Release date: Fri", "MPICH 5.0.2"),
        ("Intel(R) MPI Library 2021.18.1 for Linux* OS\n", "Intel(R) MPI Library 2021.18.1"),
        (
            "MPI VERSION    : CRAY MPICH version 8.1.28 (ANL base 3.4a2)",
            "CRAY MPICH version 8.1.28",
        ),
        ("MVAPICH2 Version      :\t2.3.7\n", "MVAPICH2 2.3.7"),
        ("Some MPI 1", "Some MPI 1"),
    ],
)
def test_library_names(text, name):
    assert library_name(text) == name


def test_defaults_are_set_only_where_the_user_has_not(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    crowded, roomy = Launch("mpirun", 0, 4, 0, 4), Launch("mpirun", 0, 4, 0, 2)

    environ = {}
    set_defaults(environ, crowded)
    assert environ == {
        "OMPI_MCA_osc": "^ucx",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "I_MPI_FABRICS": "shm",
    }
    environ = {"OMPI_MCA_osc": "ucx"}
    assert set_defaults(environ, roomy) == {"OMPI_MCA_btl_tcp_eager_limit": str(EAGER_BYTES)}
    assert environ == {"OMPI_MCA_osc": "ucx", "OMPI_MCA_btl_tcp_eager_limit": str(EAGER_BYTES)}
    assert set_defaults(environ, roomy) == {}


def test_a_chunk_is_sent_without_asking():
    """Open MPI's limit counts its own header too."""
    assert CHUNK_BYTES + 64 <= EAGER_BYTES


def test_cores_are_shared_unless_bound():
    everywhere = list(range(8))
    assert cores_per_rank([everywhere] * 3, 1) == 2
    assert cores_per_rank([[0], [1]], 1) == 1
    assert cores_per_rank([[0, 1, 2, 3], [4, 5, 6, 7]], 0) == 4
    assert cores_per_rank([[0]] * 4, 2) == 1
