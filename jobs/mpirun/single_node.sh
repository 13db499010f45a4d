#!/bin/bash
# Train on this machine with Open MPI.
#
#     jobs/mpirun/single_node.sh                               # the digits
#     RANKS=8 THREADS=2 jobs/mpirun/single_node.sh train.py    # a program of yours
#
# Needs: the mpirun of the MPI that python loads; `mpiddl doctor` shows both.
set -euo pipefail

RANKS=${RANKS:-2}                              # Open MPI refuses more than there are cores
THREADS=${THREADS:-1}                          # torch's threads a rank

export PATH=${VENV:-$PWD/.venv}/bin:$PATH      # where python and mpirun are; or load modules
export OMP_NUM_THREADS=$THREADS

if [ $# -eq 0 ]; then
    set -- jobs/digits.py --epochs 20 --out runs/single-node
fi

# By itself mpirun binds each rank to one core, for all its threads.
exec mpirun -n "$RANKS" --bind-to none python "$@" </dev/null
