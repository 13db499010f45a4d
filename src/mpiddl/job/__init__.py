"""What training programs share: flags, an epoch's line, curves, checkpoints, being preempted.

    from mpiddl import job

    @dataclass
    class Flags(job.Flags):
        hidden: Annotated[int, typer.Option(min=1, help="Units of the hidden layer.")] = 256

    def main(flags: Flags) -> None:
        world = mpiddl.init()
        ...
        run = job.Run(flags, world, model=model, optimizer=optimizer, batches=batches)
        for epoch in run.epochs():
            for x, y in loader:
                ...
                run.step(len(y), loss=loss)
            run.epoch_ends(test_accuracy=evaluate(model))
        run.finish()

    if __name__ == "__main__":
        job.start(main, Flags)

Names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpiddl.base.lazy import lazy_names

if TYPE_CHECKING:
    from mpiddl.job.flags import Flags as Flags
    from mpiddl.job.flags import start as start
    from mpiddl.job.run import Run as Run

_HOMES = {
    "Flags": "mpiddl.job.flags",
    "Run": "mpiddl.job.run",
    "start": "mpiddl.job.flags",
}

__all__ = ["Flags", "Run", "start"]


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
