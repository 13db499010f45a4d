#!/bin/bash
# torch 2.13.0, gloo: all_reduce of every second element adds other elements, and reports success.
#
# Expected: elements 0, 2, 4, 6 are summed, the others are left alone; or an error, as from NCCL.
# Seen: elements 0, 1, 2, 3 are summed. The view is taken for as many elements in a row from its start.
# Hurts: who reduces a column or a slice of a tensor: wrong values, and in the wrong places.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys

import torch
from torch import distributed, multiprocessing


def run(rank, meeting):
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    whole = torch.arange(8) + 100 * rank
    distributed.all_reduce(whole[::2])
    if rank == 0:
        print(*whole.tolist(), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(run, (sys.argv[1],), nprocs=2)
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder/meeting")
echo "0 to 7 plus 100 to 107 at every second place: $seen"
[ "$seen" = "100 102 104 106 4 5 6 7" ]
