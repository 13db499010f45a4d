"""Prints the environment in which Open MPI's wheel uses the libucx wheel's UCX, to be sourced.

The two are in the virtual environment whose Python runs this.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import libucx

FOLDER = shlex.quote(str(Path(libucx.__file__).resolve().parent / "lib"))

print(f"""\
# Open MPI with a UCX that knows CUDA. Source it before mpirun; `make gpu-env` wrote it.
export LD_LIBRARY_PATH={FOLDER}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
export OMPI_MCA_pml=ucx OMPI_MCA_pml_ucx_tls=any OMPI_MCA_pml_ucx_devices=any OMPI_MCA_osc=^ucx
# A list in UCX_TLS must have cuda in it; without the variable all transports are used.""")
