#!/bin/bash
# MPICH 5.0.2: after Allreduce with MAX, ranks hold different values if one rank had a NaN.
#
# Expected: the same result on all ranks, whichever it is. The standard (All-Reduce) requires "that all
# processes from the same group participating in these operations receive identical results".
# Seen: on two ranks, where rank 1 has NaN and rank 0 has 0: rank 0 gets NaN, rank 1 gets 0. Each
# compares its own value with the other's, and every comparison with NaN is false.
# Hurts: "does any rank's loss overflow" by MAX: ranks decide differently and wait for each other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mpi4py==4.1.2 mpich==5.0.2 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import numpy
from mpi4py import MPI

world = MPI.COMM_WORLD
mine = numpy.array([numpy.nan if world.rank == 1 else 0.0])
largest = numpy.empty_like(mine)
world.Allreduce(mine, largest, op=MPI.MAX)
found = world.gather(float(largest[0]))
if world.rank == 0:
    print(*found)
PYTHON
seen=$("$folder/venv/bin/mpiexec" -n 2 "$folder/venv/bin/python" "$folder/program.py")
echo "max(0, nan) on ranks 0 and 1: $seen"
[ "$seen" = "nan 0.0" ]
