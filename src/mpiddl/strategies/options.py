"""The options that users choose when they wrap a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mpiddl.base.settings import ENGINES, Settings
from mpiddl.base.units import parse_bytes
from mpiddl.engine.control import Control
from mpiddl.errors import MismatchError, SettingsError
from mpiddl.gradients.agreement import who_has_what

__all__ = ["AUTO", "NAN_CHECKS", "Options", "agree_on_options", "options_from"]

AUTO = "auto"
NAN_CHECKS = ("off", "warn", "error")
BUCKET_BYTES, GPU_BUCKET_BYTES = 4 << 20, 25 << 20
"""Where the user chose no other. On a GPU each bucket costs launches of kernels, and waits."""


@dataclass(frozen=True)
class Options:
    """The options of ``DataParallel``, with the settings' defaults filled in.

    Attributes:
        bucket_size: The largest bucket in bytes; None to measure it.
        engine: The name of what drives buckets; ``"auto"`` to measure it.
    """

    bucket_size: int | None
    algorithm: str
    engine: str
    check: bool
    find_unused_parameters: bool
    static_graph: bool
    broadcast_buffers: bool
    rebuild_buckets: bool
    nan_check: str
    check_replicas_every: int

    @property
    def lets_absent(self) -> bool:
        """Whether parameters may get no gradient."""
        return self.find_unused_parameters or self.static_graph


def options_from(
    settings: Settings,
    *,
    on_gpu: bool = False,
    bucket_size: int | str | None,
    algorithm: str | None,
    engine: str | None,
    nan_check: str,
    check_replicas_every: int,
    **flags: bool,
) -> Options:
    """Check what a user chose.

    Raises:
        ValueError: A value that cannot be used.
    """
    engine = engine or settings.engine
    if engine not in ENGINES:
        raise SettingsError(f"engine={engine!r} is none of {', '.join(ENGINES)}")
    if nan_check not in NAN_CHECKS:
        raise ValueError(f"nan_check={nan_check!r} is none of {', '.join(NAN_CHECKS)}")
    if check_replicas_every < 0:
        raise ValueError("check_replicas_every must not be negative; 0 turns it off")
    chosen = settings.bucket_size if bucket_size is None else bucket_size
    if chosen is None:
        chosen = GPU_BUCKET_BYTES if on_gpu else BUCKET_BYTES
    nbytes = None if chosen == AUTO else parse_bytes(chosen) if isinstance(chosen, str) else chosen
    if nbytes is not None and nbytes < 1:
        raise ValueError(f"bucket_size={bucket_size!r} is not positive; write for example 4MiB")
    return Options(
        bucket_size=nbytes,
        algorithm=algorithm or settings.algorithm,
        engine=engine,
        nan_check=nan_check,
        check_replicas_every=check_replicas_every,
        **flags,
    )


def agree_on_options(options: Options, control: Control) -> None:
    """Stop on every rank if they chose differently: they would wait for each other. Collective.

    Raises:
        MismatchError: Names the first option that differs.
    """
    chosen = control.gather_json(asdict(options))
    for name in chosen[0]:
        values = [theirs[name] for theirs in chosen]
        if any(value != values[0] for value in values):
            raise MismatchError(
                f"DataParallel({name}=) is {who_has_what(values)}; pass the same on every rank"
            )
