#!/bin/bash
# Train with Intel MPI, on this machine or on several that ssh reaches. No scheduler.
#
#     jobs/mpirun/intel.sh                                     # the digits
#     HOSTFILE=mine RANKS=8 jobs/mpirun/intel.sh train.py      # a program of yours
#
# Needs: an Intel MPI: `make install MPI=intel`, or the cluster's (then set MPIEXEC and
# MPI4PY_LIBMPI). A line of the hostfile is `node1:4`: a name, and how many ranks run there.
set -euo pipefail

RANKS=${RANKS:-2}                              # on all hosts together
HOSTFILE=${HOSTFILE:-}                         # empty: this machine
THREADS=${THREADS:-1}                          # torch's threads a rank

VENV=${VENV:-$PWD/.venv}
MPIEXEC=${MPIEXEC:-$VENV/intel/bin/mpiexec.hydra}
export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-$VENV/intel/lib/libmpi.so.12}
export PATH=$VENV/bin:$PATH
export OMP_NUM_THREADS=$THREADS
export I_MPI_PIN_DOMAIN=${I_MPI_PIN_DOMAIN:-omp}   # as many cores a rank as it has threads

if ! command -v "$MPIEXEC" > /dev/null; then
    echo "no $MPIEXEC; run \`make install MPI=intel\`, or set MPIEXEC and MPI4PY_LIBMPI" >&2
    exit 2
fi
if [ $# -eq 0 ]; then
    set -- jobs/digits.py --epochs 20 --out runs/intel
fi

hosts=()
if [ -n "$HOSTFILE" ]; then
    hosts=(-machinefile "$HOSTFILE")
fi
exec "$MPIEXEC" "${hosts[@]}" -n "$RANKS" python "$@" </dev/null
