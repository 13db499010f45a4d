"""Traps of signals and of exit status: each with a script that falls into it, and its good twin."""

from __future__ import annotations

import pytest
from sbatch_cases import (
    CORES,
    GOOD,
    LAUNCH,
    LOOP,
    REQUEUE,
    STEP,
    TASKS,
    check_pair,
    good,
    launched,
    requeue,
)

from mpiddl.sbatch.check import check_script

# (bad, line, what, what to write, good)
SIGNALS = [
    (
        requeue(("#SBATCH --open-mode=append\n", "")),
        3,
        "overwrites the output",
        "--open-mode=append",
        requeue(("--open-mode=append", "--open-mode a")),
    ),
    (
        requeue(("#SBATCH --signal=B:USR1@60\n", "")),
        3,
        "--requeue without --signal",
        "--signal=B:USR1@60",
        requeue(),
    ),
    (
        requeue(("#SBATCH --requeue\n", "")),
        18,
        "site's default",
        "write #SBATCH --requeue",
        requeue(),
    ),
    (
        requeue(("=B:USR1@60", "=USR1@60")),
        5,
        "goes to the steps only",
        "--signal=B:USR1@60",
        good((TASKS, TASKS + "\n#SBATCH --signal=USR1@60")),
    ),
    (
        requeue(("trap forward USR1", "")),
        5,
        "goes to the shell only, which has no trap",
        "trap 'kill -USR1",
        good((TASKS, TASKS + "\n#SBATCH --signal=B:USR1@60"), (LAUNCH, "exec " + LAUNCH)),
    ),
    (
        requeue(("trap forward USR1", "trap forward TERM")),
        5,
        "goes to the shell only",
        "trap 'kill -USR1",
        requeue(("trap forward USR1", "trap -- forward SIGUSR1 EXIT"), ("B:USR1", "B:10")),
    ),
    (
        requeue((STEP + " &\nstep=$!\n", ""), ("status=0\nwait", STEP + "\nstatus=0\nwait")),
        11,
        "bash runs the trap of USR1 only after srun has ended",
        'wait "$step"',
        good((LAUNCH, "trap 'rm -rf scratch' EXIT\n" + LAUNCH)),
    ),
    (
        requeue((STEP + " &\nstep=$!\n", ""), ("status=0\nwait", "train\nstatus=0\nwait")).replace(
            "again=\n", "again=\ntrain() { " + STEP + "; }\n", 1
        ),
        9,
        "only after srun",
        "end it with &",
        requeue((STEP + " &", "train &"), ("again=\nf", "again=\ntrain() { " + STEP + "; }\nf")),
    ),
    (
        good((LAUNCH, f"trap 'kill $!' TERM\n{LAUNCH}"), (CORES, CORES + " --signal=B:TERM")),
        8,
        "bash runs the trap of TERM only after srun",
        "end it with &",
        good((LAUNCH, f"trap 'rm -rf scratch' TERM\n{LAUNCH}")),
    ),
    (
        good((LAUNCH, LAUNCH + " &")),
        7,
        "ends without waiting",
        'wait "$step"',
        good((LAUNCH, LAUNCH + ' &\nwait "$!"')),
    ),
    (
        requeue((LOOP, "")),
        14,
        "wait returns as soon as a trap has run",
        "in a loop",
        requeue((LOOP, 'wait "$step" || status=$?\n')),
    ),
    (
        requeue(('wait "$step" || status=$?\nwhile', 'wait "$step"\nwhile')),
        14,
        "`set -e` then ends the script",
        "|| status=$?",
        requeue(("set -euo pipefail\n", ""), ("|| status=$?\nwhile", "; status=$?\nwhile")),
    ),
    (
        good((LAUNCH, LAUNCH + " &\nwait")),
        8,
        "wait without a process is always successful",
        'wait "$step"',
        good((LAUNCH, LAUNCH + ' &\nstep=$!\nwait "$step"')),
    ),
    (
        requeue((STEP, STEP.replace("srun", "srun --kill-on-bad-exit=1"))),
        10,
        "the first rank that has saved its state ends the others",
        "--kill-on-bad-exit=0",
        requeue((STEP, STEP.replace("srun", "srun -K0"))),
    ),
    (
        requeue(("USR1", "USR2"), (STEP, "mpiexec -ppn 4 python train.py")),
        5,
        "MPICH's mpiexec does not pass USR2 on",
        "write USR1",
        requeue((STEP, "mpiexec -ppn 4 python train.py")),
    ),
    (
        requeue(("USR1", "TERM"), (STEP, "mpirun python train.py")),
        5,
        "Open MPI's mpirun does not pass TERM on",
        "write USR1",
        requeue((STEP, "mpirun python train.py")),
    ),
]

STATUS = [
    (
        good(("set -euo pipefail", ""), (LAUNCH, LAUNCH + "\necho done")),
        7,
        "a failure is forgotten",
        "set -e",
        good(("set -euo pipefail", "")),
    ),
    (
        good(("set -euo pipefail", "set -u"), (LAUNCH, LAUNCH + "\necho done")),
        7,
        "a failure is forgotten",
        "set -e",
        good(("set -euo pipefail", ""), (LAUNCH, LAUNCH + "\nstatus=$?\necho done\nexit $status")),
    ),
    (
        good(("set -euo pipefail", ""), (LAUNCH, LAUNCH + "\necho done")),
        7,
        "a failure is forgotten",
        "set -e",
        good(("set -euo pipefail", "set -o errexit"), (LAUNCH, LAUNCH + "\necho done")),
    ),
    (
        good(("set -euo pipefail", "set -e"), (LAUNCH, LAUNCH + " | tee log")),
        7,
        "the status is that of what stands behind the |",
        "pipefail",
        good((LAUNCH, LAUNCH + " | tee log")),
    ),
]


@pytest.mark.parametrize(("bad", "line", "what", "fix", "twin"), [*SIGNALS, *STATUS])
def test_a_trap_is_named_where_it_is_and_its_twin_has_none(bad, line, what, fix, twin):
    check_pair(bad, line, what, fix, twin)


def test_good_scripts_have_no_traps():
    assert check_script(GOOD) == []
    assert check_script(REQUEUE) == []
    # A shell that forwards in the trap itself, and scripts that write scripts.
    assert check_script(requeue((LOOP, ""), ("|| true;", '|| true; wait "$step";'))) == []
    assert check_script(good(("set -e", "cat <<'E' >x\n#SBATCH -N 1\nsrun x'\nE\nset -e"))) == []
    handed = ("|| status=$?\nwhile", "; status=$?\nwhile")
    assert check_script(requeue(("status=0\nwait", "set +e\nwait"), handed)) == []
    assert check_script(launched(LAUNCH + "\npython evaluate.py")) == []
    assert check_script(good((LAUNCH, "if ! " + LAUNCH + "; then echo failed; exit 1; fi"))) == []
