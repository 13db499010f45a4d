"""Locks on files, where the file system knows them."""

from __future__ import annotations

import errno
import fcntl
import os

from mpiddl.base.log import logger, speaks

__all__ = ["lock"]

# Lustre that was mounted without flock, network file systems without a lock daemon, ...; flock with
# flags as ours is never invalid by itself.
_UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

_told = False


def lock(handle: int, how: int) -> bool:
    """``flock``; False, and one warning in all, where the file system has no locks.

    Raises:
        BlockingIOError: Another process has it, and ``how`` says not to wait.
        OSError: Anything else that is wrong.
    """
    global _told
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        if not _told and speaks():
            logger.warning(
                "%s: the file system has no file locks (%s); mpiddl goes on without them, and may "
                "leave files of killed jobs behind. Mount it with flock, or choose another folder",
                os.readlink(f"/proc/self/fd/{handle}"),
                error.strerror,
            )
        _told = True
        return False
    return True
