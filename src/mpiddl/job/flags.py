"""The flags that all training programs have, and how a program adds its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from mpiddl.base.settings import ALGORITHM_NAMES
from mpiddl.cli.arguments import finite
from mpiddl.cli.run import run
from mpiddl.job import checks
from mpiddl.job.config import take_config
from mpiddl.job.preemption import listen

__all__ = ["Flags", "command_of", "start"]


@dataclass(kw_only=True)
class Flags:
    """A program derives from it, with a default ``out``; fields are typer options.

    ``lr: float = 0.1`` in a derived class changes the default alone. Integers of more than 64 bits
    are refused, and so are ``nan`` and ``inf`` unless the option has a callback.
    """

    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 20
    batch_size: Annotated[int, typer.Option(min=1, help="Global: over all ranks.")] = 64
    lr: Annotated[float, typer.Option(callback=checks.positive, help="Learning rate.")] = 1e-3
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of split, weights, order, dropout.")
    ] = 0
    out: Annotated[Path, typer.Option(callback=checks.writable, help="Folder for results.")]
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            callback=checks.not_both,
            help="Go on from the last checkpoint in --out, if any.",
        ),
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            callback=checks.not_both,
            help="Begin anew: remove the checkpoints in --out.",
        ),
    ] = False
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: after each epoch.")
    ] = 0
    keep: Annotated[int, typer.Option(min=1, help="The newest checkpoints that are kept.")] = 3
    algorithm: Annotated[
        str | None,
        typer.Option(
            callback=checks.known_algorithm,
            help=f"All-reduce: {', '.join(ALGORITHM_NAMES)}. Default: MPIDDL_ALGORITHM, or auto.",
        ),
    ] = None
    bucket_size: Annotated[
        str | None,
        typer.Option(
            callback=checks.size,
            help="Largest gradient bucket. Default: MPIDDL_BUCKET_SIZE, or 4MiB (25MiB on a GPU).",
        ),
    ] = None


MOST = 2**63 - 1
F = TypeVar("F", bound=Flags)

_CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=take_config, help="TOML file with values of these."
    ),
]


def start(main: Callable[[F], Any], flags: type[F]) -> None:
    """Parse ``sys.argv`` into ``flags`` and call ``main`` with it.

    Usage errors and ``--help`` are printed once, whatever the number of ranks. SIGUSR1 is kept for
    ``Run`` from now on.
    """
    listen()
    run(command_of(main, flags))


def command_of(main: Callable[[F], Any], flags: type[F]) -> Callable[..., None]:
    """``main`` as a function whose parameters typer can read: the flags, and ``--config``."""

    def command(config: Any = None, **values: Any) -> None:
        main(flags(**values))

    types = _types(flags) | {"config": _CONFIG}
    defaults = {field.name: field.default for field in fields(flags)} | {"config": None}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=types[name],
        )
        for name, default in defaults.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = types
    command.__doc__ = main.__doc__
    return command


def _types(flags: type[Flags]) -> dict[str, Any]:
    """Of each field; a bare type in a derived class keeps the options of the class it is from."""
    types: dict[str, Any] = {}
    for owner in reversed(flags.__mro__[:-1]):
        hints = get_type_hints(owner, include_extras=True)
        for name in inspect.get_annotations(owner):
            if get_origin(hints[name]) is Annotated or name not in types:
                types[name] = hints[name]
    return {name: _guarded(hint) for name, hint in types.items()}


def _guarded(hint: Any) -> Any:
    """``hint`` with an option that refuses the numbers which typer's own limits let pass."""
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kinds = set(get_args(kind)) or {kind}
    if not kinds & {int, float}:
        return hint
    option = copy.copy(
        next((note for note in notes if isinstance(note, OptionInfo)), typer.Option())
    )
    if float in kinds:
        option.callback = option.callback or finite
    elif option.max is None:
        option.max = MOST
    return Annotated[kind, option]
