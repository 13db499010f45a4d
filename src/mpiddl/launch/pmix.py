"""A wait for all ranks that sends no MPI message, through the PMIx by which srun started them."""

from __future__ import annotations

import ctypes
import os
import re
import struct

from mpiddl.base.log import logger
from mpiddl.launch.launchers import has_slurms_pmix
from mpiddl.launch.library import mapped_file

__all__ = ["fence"]

_LIBRARY = re.compile(r"\s(/\S*/libpmix\.so[\d.]*)$", re.MULTILINE)

# A pmix_info_t: key, flags, type of the value (1 is a bool), value; the same from PMIx 2 to 5.
_INFO = struct.Struct("512s I 4x H 6x ? 23x")
_BOOL = 1


def fence(*, collect: bool = True) -> bool:
    """Return once all ranks of the job are here. Collective.

    Open MPI 5 ends MPI_Init with such a fence, because a message that arrives before crashes
    the receiver. But Slurm (seen in 22.05) lets a fence that collects no data pass at once, if
    the job has fewer nodes than TreeWidth; those with ``collect`` wait, on any number of nodes.

    Args:
        collect: Let Slurm hand round what ranks have published: nothing new.

    Returns:
        Whether there was one. Nothing happens where srun did not start the ranks through PMIx,
        or the MPI has brought no libpmix.
    """
    path = mapped_file(_LIBRARY) if has_slurms_pmix(os.environ) else None
    if path is None:
        return False
    info = _INFO.pack(b"pmix.collect", 0, _BOOL, collect)
    status = ctypes.CDLL(path).PMIx_Fence(None, ctypes.c_size_t(0), info, ctypes.c_size_t(1))
    if status != 0:
        logger.warning("PMIx_Fence of %s returned %d: this rank did not wait for all", path, status)
    return bool(status == 0)
