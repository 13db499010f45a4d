"""What each launcher's environment means. The variables are as the launchers set them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpiddl.collectives.choose import CHUNK_BYTES
from mpiddl.comm.layout import cores_of
from mpiddl.errors import SingletonError
from mpiddl.launch import offers
from mpiddl.launch.launchers import (
    Launch,
    has_slurms_pmix,
    read_launch,
    refuse_launcher_without_mpi,
    refuse_singleton,
    without_launcher,
)
from mpiddl.launch.library import EAGER_BYTES, library_name, set_defaults

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
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}


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
        (TORCHRUN, ("torchrun", 1, 4, 1, 2, False)),
        ({**STEP, **TORCHRUN}, ("torchrun", 1, 4, 1, 2, False)),  # srun starts it, once a node
        # deepspeed; and a user's own settings under mpirun
        (DEEPSPEED, ("a launcher of torch.distributed", 1, 2, 1, None, False)),
        ({**DEEPSPEED, **OPEN_MPI}, ("Open MPI's mpirun", 3, 4, 1, 2)),
        (
            {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1"},
            ("horovodrun", 1, 2, 1, None, False),
        ),
        # what mpiddl itself offers, in a process that a rank has started
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (None, None, None, None, None)),
    ],
)
def test_each_launcher(environ, want):
    assert read_launch(environ) == Launch(*want)


@pytest.mark.parametrize(
    ("namespace", "want"), [("slurm.pmix.7.0", True), ("prterun-host-123@1", False), (None, False)]
)
def test_srun_with_pmix_is_told_from_mpirun_in_its_job(namespace, want):
    environ = {**STEP, "PMIX_NAMESPACE": namespace} if namespace else STEP
    assert has_slurms_pmix(environ) == want


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


def test_launchers_without_mpi_are_refused_before_mpi_starts():
    with pytest.raises(SingletonError, match="mpirun -n 4 python .*srun --mpi=pmix -n 4"):
        refuse_launcher_without_mpi(read_launch(TORCHRUN))
    with pytest.raises(SingletonError, match="mpirun -n 2 python"):
        refuse_launcher_without_mpi(read_launch(DEEPSPEED))
    for harmless in (OPEN_MPI, STEP, {**TORCHRUN, "WORLD_SIZE": "1"}):
        refuse_launcher_without_mpi(read_launch(harmless))


def test_another_job_starts_without_this_ones_variables():
    mine = {"PATH": "/bin", "RANKS": "8", "MASTER_ADDR": "localhost"}
    assert without_launcher({**OPEN_MPI, **HYDRA, **STEP, **TORCHRUN, **mine}) == mine


def test_ranks_are_offered_to_other_libraries():
    environ = {"PATH": "/bin"}
    offers.offer(1, 2, 0, environ)
    assert environ == {"PATH": "/bin", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    offers.offer(0, 3, 0, environ)  # another world, after this one was closed
    assert environ == {"PATH": "/bin", "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    environ["RANK"] = "7"
    offers.withdraw(environ)
    assert environ == {"PATH": "/bin", "RANK": "7"}


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_what_a_user_set_is_left_alone(name, caplog):
    environ = {name: "0"}
    offers.offer(0, 2, 0, environ)
    assert environ == {name: "0"}
    assert "this is rank 0 of 2, but the environment has" in caplog.text
    offers.withdraw(environ)
    assert environ == {name: "0"}


def test_a_rank_alone_offers_nothing():
    environ = {}
    offers.offer(0, 1, 0, environ)
    assert environ == {}


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
    monkeypatch.setattr("mpiddl.launch.library._cores_of_node", lambda: 2)
    crowded, roomy = Launch("mpirun", 0, 4, 0, 4), Launch("mpirun", 0, 4, 0, 2)

    environ = {}
    set_defaults(environ, crowded)
    assert environ == {
        "OMPI_MCA_osc": "^ucx",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "I_MPI_FABRICS": "shm",
        "OMPI_MCA_btl": "^ofi,openib",
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
    assert cores_of([everywhere], 0) == (8, 1)
    assert cores_of([everywhere] * 3, 1) == (2, 3)
    assert cores_of([[0], [1]], 1) == (1, 1)
    assert cores_of([[0, 1, 2, 3], [4, 5, 6, 7]], 0) == (4, 1)
    assert cores_of([[0]] * 4, 2) == (1, 4)


LAUNCHER = """
import os, subprocess, sys
rank, mine, ranks = sys.argv[1:]
os.sched_setaffinity(0, map(int, mine.split(",")))
subprocess.run([sys.executable, "-c", rank, ranks])
"""
RANK = """
import os, sys
from mpiddl.launch.library import _cores_of_node
os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
print(_cores_of_node())
"""


def test_cores_that_the_job_may_use_count_and_not_those_of_the_machine():
    """Of a launcher and a rank that it binds to one core, or not."""
    cores = sorted(os.sched_getaffinity(0))
    for mine, bound_to in ((cores[:1], cores[:1]), (cores, cores[:1])):
        lists = [",".join(map(str, numbers)) for numbers in (mine, bound_to)]
        said = subprocess.check_output([sys.executable, "-c", LAUNCHER, RANK, *lists], text=True)
        assert int(said) == len(mine)
