"""sbatch scripts without traps, for tests to change."""

from __future__ import annotations

from mpiddl.sbatch.check import check_script

GOOD = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=2
set -euo pipefail
export OMP_NUM_THREADS=2
srun --mpi=pmix --cpus-per-task=2 python train.py
"""
TASKS, CORES, THREADS = GOOD.splitlines()[2], GOOD.splitlines()[3], GOOD.splitlines()[5]
LAUNCH = GOOD.splitlines()[6]

REQUEUE = """\
#!/bin/bash
#SBATCH --ntasks-per-node=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -euo pipefail
export OMP_NUM_THREADS=1
again=
forward() { again=yes; kill -USR1 "$step" || true; }
srun --mpi=pmix python train.py &
step=$!
trap forward USR1
status=0
wait "$step" || status=$?
while [ "$again" ]; do
    again= status=0
    wait "$step" || status=$?
done
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""
STEP = "srun --mpi=pmix python train.py"
LOOP = REQUEUE[REQUEUE.index("while") : REQUEUE.index("if [")]


def good(*changes):
    """GOOD with lines (or parts of them) changed."""
    return changed(GOOD, *changes)


def requeue(*changes):
    return changed(REQUEUE, *changes)


def changed(text, *changes):
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def launched(line, *changes):
    return good((LAUNCH, line), *changes)


def check_pair(bad, line, what, fix, twin):
    """``bad`` has one trap, which is named where it is; its good twin has none."""
    found = check_script(bad)
    assert len(found) == 1, found
    assert found[0].line == line, found
    assert what in found[0].what
    assert fix in found[0].fix
    assert check_script(twin) == []
