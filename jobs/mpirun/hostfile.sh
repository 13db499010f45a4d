#!/bin/bash
# Train on several machines with Open MPI, which reaches them by ssh. No scheduler.
#
#     jobs/mpirun/hostfile.sh                                  # the digits
#     HOSTFILE=mine jobs/mpirun/hostfile.sh train.py --lr 0.1  # a program of yours
#
# Needs: ssh to each host without a password, and the same files on all of them. A line of the
# hostfile is `node1 slots=4`: a name, and how many ranks run there.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hosts}                    # one rank for each of its slots
THREADS=${THREADS:-1}                          # torch's threads a rank

export PATH=${VENV:-$PWD/.venv}/bin:$PATH      # where python and mpirun are; or load modules
export OMP_NUM_THREADS=$THREADS

if [ ! -r "$HOSTFILE" ]; then
    echo "no hostfile $HOSTFILE; write lines such as: node1 slots=4; or set HOSTFILE" >&2
    exit 2
fi
if [ $# -eq 0 ]; then
    set -- jobs/digits.py --epochs 20 --out runs/hostfile
fi

# Called by its whole path, mpirun finds itself at the same place on the other hosts. -x sends
# variables along, which ssh does not.
exec "$(command -v mpirun)" --hostfile "$HOSTFILE" --map-by slot --bind-to none \
    -x PATH -x OMP_NUM_THREADS python "$@" </dev/null
