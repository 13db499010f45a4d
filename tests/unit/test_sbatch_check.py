"""The traps of sbatch scripts: each with a script that falls into it, and its good twin."""

from __future__ import annotations

from pathlib import Path

import pytest
from sbatch_cases import CORES, GOOD, LAUNCH, TASKS, THREADS, check_pair, good, launched

from mpiddl.sbatch.check import check_script

TOP = Path(__file__).parents[2]

# (bad, line, what, what to write, good)
ASKING = [
    (
        good(("#SBATCH --nodes", "# SBATCH --nodes")),
        2,
        "plain comment",
        "write #SBATCH --nodes=2",
        good((TASKS, "# SBATCH lines follow.\n#    sbatch --nodes=2 this\n" + TASKS)),
    ),
    (good(("#SBATCH --nodes", "##SBATCH --nodes")), 2, "plain comment", "#SBATCH --nodes", good()),
    (good(("#SBATCH --nodes", " #SBATCH --nodes")), 2, "plain comment", "#SBATCH --nodes", good()),
    (good(("#SBATCH --nodes", "#sbatch --nodes")), 2, "plain comment", "#SBATCH --nodes", good()),
    (good(("#SBATCH --nodes", "#SBATCH nodes")), 2, "has no option", "write #SBATCH --no", good()),
    (
        good(("--nodes=2", '--nodes=2 --comment="x')),
        2,
        "a quote that is not closed",
        "close it",
        good(("--nodes=2", '--nodes=2 --comment="x y"  # it\'s a comment')),
    ),
    (
        good((CORES, "cd /data\n" + CORES)),
        5,
        "below the first command",
        "move it up",
        good(("#SBATCH --nodes=2", "\n# a comment\n#SBATCH --nodes=2")),
    ),
    (
        good((CORES, CORES + "\n#SBATCH --output=$HOME/%j.out")),
        5,
        "--output=$HOME/%j.out is taken as it stands",
        "%j",
        good((CORES, CORES + "\n#SBATCH --output=%x-%j.out  # not $HOME")),
    ),
    (good(("--nodes=2", "-o ~/x")), 2, "--o=~/x is taken as it stands", "write it", good()),
    (GOOD.replace("\n", "\r\n"), 1, "as on DOS", "dos2unix", GOOD),
    (
        good(("#SBATCH --ntasks-per-node=4", "#SBATCH --time=5")),
        7,
        "nothing says how many ranks",
        "write #SBATCH --ntasks-per-node=N",
        launched(f"{LAUNCH.replace(' python', ' -n 8 python')}", (TASKS + "\n", "")),
    ),
    (
        good((TASKS, "#SBATCH --ntasks-per-core=1")),
        7,
        "nothing says how many ranks",
        "write #SBATCH --ntasks-per-node=N",
        good((TASKS, "#SBATCH --tasks-per-node=4")),
    ),
    (
        launched("mpirun -n 4 python train.py", (TASKS, "#SBATCH --tasks=4")),  # 4 on each node
        7,
        "asks for 8",
        "mpirun -n",
        launched("srun --cpus-per-t=2 --mp=pmix python t.py", (TASKS, "#SBATCH --tasks 4")),
    ),
    (
        launched("srun --mpi=pmix python train.py"),
        7,
        "does not inherit --cpus-per-task=2",
        'srun --cpus-per-task="$SLURM_CPUS_PER_TASK"',
        launched("srun -c 2 --mpi pmix python train.py"),
    ),
    (
        launched("srun --mpi=pmix python train.py", (CORES, "#SBATCH -c 2")),
        7,
        "does not inherit",
        "srun --cpus",
        launched("export SRUN_CPUS_PER_TASK=2\nsrun --mpi=pmix python train.py"),
    ),
    (good((THREADS, "")), 7, "OMP_NUM_THREADS is not set", "write export OMP_NUM_THREADS", good()),
    (
        good((THREADS, "OMP_NUM_THREADS=2")),
        6,
        "is not exported",
        "write export",
        good((THREADS, ""), (LAUNCH, f"OMP_NUM_THREADS=2 {LAUNCH}")),
    ),
]

LAUNCHING = [
    (
        launched("srun -c 2 python train.py"),
        7,
        "srun without --mpi",
        "--mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH",
        launched("export SLURM_MPI_TYPE=pmix\nsrun -c 2 python train.py"),
    ),
    (launched("srun -c2 --mpi=none python x.py"), 7, "srun --mpi=none", "--mpi=pmix", good()),
    (
        launched('step=(srun -c 2)\n"${step[@]}" \\\n  python train.py'),
        8,
        "srun without --mpi",
        "--mpi=pmix",
        launched('step=(srun -c 2 \\\n --mpi=pmix)\n"${step[@]}" python train.py'),
    ),
    (
        launched('srun -c 2 \\\n  bash -c "python train.py"'),
        7,
        "srun without --mpi",
        "--mpi=pmix",
        launched("srun hostname\nsrun -n 1 ./fetch\n" + LAUNCH),
    ),
    (
        launched("srun -c 2 mpirun python train.py"),
        7,
        "srun starts mpirun once for each rank",
        'mpirun -n "$SLURM_NTASKS"',
        launched('mpirun -n "$SLURM_NTASKS" python train.py'),
    ),
    (
        launched("mpirun -np 4 python train.py"),
        7,
        "starts 4 ranks where the script asks for 8",
        'mpirun -n "$SLURM_NTASKS"',
        launched("ranks=8\nmpirun -np $ranks python train.py"),
    ),
    (
        launched("mpirun -n 4 python train.py", (TASKS, "#SBATCH -n 6")),
        7,
        "asks for 6",
        "mpirun -n",
        launched("mpirun -n 6 python train.py -n 4", (TASKS, "#SBATCH -n6")),
    ),
    (
        launched("srun -c 2 --mpi=pmix torchrun train.py"),
        7,
        "torchrun starts processes that are no MPI ranks",
        "srun --mpi=pmix python",
        good(),
    ),
    (
        launched("python -m torch.distributed.run train.py"),
        7,
        "torch.distributed.run starts",
        "srun --mpi=pmix python",
        launched("python -m pip list\n" + LAUNCH),
    ),
    (
        launched("srun -c 2 --mpi=pmix horovodrun -np 8 python train.py"),
        7,
        "horovodrun starts processes that are no MPI ranks",
        "srun --mpi=pmix python",
        launched("horovodrun --mpi -np 8 python train.py\nsrun -J deepspeed " + LAUNCH[5:]),
    ),
    (
        launched("timeout 60 deepspeed --num_gpus=4 train.py"),
        7,
        "deepspeed starts processes",
        "srun --mpi=pmix python",
        launched(
            "pip install deepspeed\ndeepspeed --launcher openmpi train.py\n"
            + LAUNCH
            + " --strategy deepspeed"
        ),
    ),
    (
        launched('run="accelerate launch -m"\nall="$run train"\nsrun -c 2 --mpi=pmix $all'),
        9,
        "accelerate launch starts processes",
        "srun --mpi=pmix python",
        launched("accelerate config\n" + LAUNCH),
    ),
    (
        launched('srun -c 2 --mpi=pmix bash -c "cd x; python3 -m deepspeed.launcher.runner t.py"'),
        7,
        "deepspeed.launcher.runner starts processes",
        "srun --mpi=pmix python",
        launched("srun -c 2 --mpi=pmix bash -c 'cd deepspeed && python3 t.py'"),
    ),
    (
        launched(f"while read rate; do\n{LAUNCH} $rate\ndone < rates"),
        8,
        "srun reads the lines that are meant for the loop's `read`",
        "write </dev/null behind it",
        launched(f"while read rate; do\n{LAUNCH} $rate </dev/null\ndone < rates"),
    ),
    (
        launched("cat rates | while read r; do srun -n 1 ./fetch $r; done\n" + LAUNCH),
        7,
        "the loop runs once",
        "</dev/null",
        launched("for r in 1; do while read x; do :; done < a\nsrun -n 1 ./f $r; done\n" + LAUNCH),
    ),
    (
        launched("go() { mpirun -n 8 python t.py $1; }\nwhile true; do read x\ngo $x; done < xs"),
        7,
        "mpirun reads the lines",
        "</dev/null",
        launched(
            "go() { mpirun -n 8 python t.py $1; }\nwhile read -u 3 x; do go $x; done 3< xs\n"
            "while read x <&3; do go $x; done 3< xs\n"
            "while read x; do go $x </dev/null; go <<< $x; echo $x | go; done < xs\n"
            "while read x; do srun -c 2 --mpi=pmix -i none python x.py; done < xs\n"
            "while read x; do go $x <<END\ntext\nEND\ndone < xs"
        ),
    ),
    (
        launched("python train.py"),
        7,
        "one process trains alone",
        "srun --mpi=pmix python",
        launched("python one.py", ("nodes=2", "nodes=1"), ("node=4", "node=1")),
    ),
]

GPUS = [
    (
        good((CORES, CORES + "\n#SBATCH --gpus-per-task=1")),
        5,
        "--gpus-per-task lets each rank see its own GPU only",
        "--gpus-per-node=N --gpu-bind=none",
        good((CORES, CORES + "\n#SBATCH --gpus-per-node=4 --gpu-bind=none")),
    ),
    (
        good((CORES, CORES + "\n#SBATCH --gpus-per-task=1")),
        5,
        "own GPU only",
        "--gpu-bind=none",
        good((CORES, CORES + "\n#SBATCH --gpus-per-task=1 --gpu-bind=none")),
    ),
    (
        good((CORES, CORES + "\n#SBATCH --gpus-per-task=1")),
        5,
        "own GPU only",
        "--gpu-bind=none",
        good((CORES, CORES + "\n#SBATCH --gpus-per-task=1"), ("per-node=4", "per-node=1")),
    ),
    (
        launched("srun --gpu-bind=closest -c 2 --mpi=pmix python train.py"),
        7,
        "--gpu-bind=closest lets each rank",
        "--gpu-bind=none",
        launched("srun --gpu-bind=verbose,none -c 2 --mpi=pmix python train.py"),
    ),
    (
        good((CORES, CORES + "\n#SBATCH --tres-per-task=gres/gpu:1")),
        5,
        "--tres-per-task lets each rank",
        "--gpu-bind=none",
        good((CORES, CORES + "\n#SBATCH --tres-per-task=gres/gpu:1 --tres-bind=gres/gpu:none")),
    ),
    (
        launched(
            "srun -c 2 --mpi=pmix bash -c 'CUDA_VISIBLE_DEVICES=$SLURM_LOCALID python train.py'"
        ),
        7,
        "CUDA_VISIBLE_DEVICES differs from rank to rank",
        "leave it out",
        launched("export CUDA_VISIBLE_DEVICES=0,1,2,3\n" + LAUNCH),
    ),
    (
        launched("export CUDA_VISIBLE_DEVICES=$((SLURM_PROCID%4))\n" + LAUNCH),
        7,
        "CUDA_VISIBLE_DEVICES differs",
        "leave it out",
        good(),
    ),
]


@pytest.mark.parametrize(("bad", "line", "what", "fix", "twin"), [*ASKING, *LAUNCHING, *GPUS])
def test_a_trap_is_named_where_it_is_and_its_twin_has_none(bad, line, what, fix, twin):
    check_pair(bad, line, what, fix, twin)


@pytest.mark.parametrize(
    "path", sorted((TOP / "jobs").glob("slurm/*.sbatch")), ids=lambda p: p.name
)
def test_our_own_scripts_have_no_traps(path):
    assert check_script(path.read_text()) == []
