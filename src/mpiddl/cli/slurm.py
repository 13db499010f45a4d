"""``mpiddl slurm``: sbatch scripts, written and checked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["CONTEXT", "slurm"]

# What follows the program's name is the program's, with or without a `--` in front.
MOST = 1_000_000
CONTEXT = {"allow_interspersed_args": False}


def slurm(
    program: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- PROGRAM", help="What each rank runs, with its arguments."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=MOST, help="Hosts.")] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Default: as many as GPUs, else 1.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Every rank sees all of its node.")
    ] = None,
    cpus_per_rank: Annotated[int, typer.Option(min=1, max=MOST, help="Cores, and threads.")] = 1,
    time: Annotated[
        str,
        typer.Option(
            callback=lambda text: _checked("check_time", text),
            help="As Slurm takes it: 90 are minutes, 2-12 are days and hours.",
        ),
    ] = "1:00:00",
    requeue: Annotated[
        bool,
        typer.Option(
            "--requeue",
            help="At USR1, a minute before the end, the program saves its state and ends with "
            "status 75; the job is queued again, and goes on with --resume.",
        ),
    ] = False,
    mpi: Annotated[
        str,
        typer.Option(
            callback=lambda text: _check_mpi(text),
            help="pmix (srun with Open MPI), pmi2 (srun with MPICH or Intel MPI), or mpirun.",
        ),
    ] = "pmix",
    partition: Annotated[
        str | None, typer.Option(callback=lambda text: _checked("check_name", text))
    ] = None,
    account: Annotated[
        str | None, typer.Option(callback=lambda text: _checked("check_name", text))
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            callback=lambda text: _checked("check_name", text), help="Default: the program's."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; default: print it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of -o.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Name the known traps in a script; exit 1 if any."),
    ] = None,
) -> None:
    """Write an sbatch script that starts PROGRAM on every rank; or check one.

    mpiddl slurm --nodes 2 --ranks-per-node 4 -o job.sbatch -- python jobs/digits.py --epochs 5
    """
    from mpiddl.errors import LaunchError
    from mpiddl.launch.launchers import read_launch
    from mpiddl.sbatch.writing import Batch, write_script

    if not read_launch().is_first:
        return  # under mpirun: one rank is enough
    if check is not None:
        if program:
            raise LaunchError("--check reads a script, and takes no program: leave one of them out")
        _check(check)
        return
    if not program:
        raise LaunchError("which program? Write: mpiddl slurm -- python script.py --its options")
    batch = Batch(
        program=tuple(program),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_rank=cpus_per_rank,
        time=time,
        requeue=requeue,
        mpi=mpi,
        partition=partition,
        account=account,
        name=name,
    )
    _write(write_script(batch), output, force)


def _write(script: str, output: Path | None, force: bool) -> None:
    """On standard output, or into a file, which is replaced by ``--force`` only."""
    from mpiddl.errors import OutputError

    if output is None:
        typer.echo(script, nl=False)
        return
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(script)
    except FileExistsError:
        raise OutputError(f"{output} exists; pass --force to replace it") from None
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}; pass -o") from None
    typer.echo(f"written to {output}; submit it: sbatch {output}")


def _check(path: Path) -> None:
    """Print one line for each trap, and leave with status 1 if there is one."""
    from mpiddl.errors import LaunchError
    from mpiddl.sbatch.check import check_script

    try:
        findings = check_script(path.read_bytes().decode())
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LaunchError(f"{path} is no script: it is not text") from None
    except ValueError as error:
        raise LaunchError(f"{path} is no script that can be checked: {error}") from None
    for line, what, fix in findings:
        typer.echo(f"{path}:{line}: {what}; {fix}")
    if findings:
        sys.exit(1)
    typer.echo(f"{path}: none of the known traps")


def _checked(checker: str, text: str | None) -> str | None:
    from mpiddl.sbatch import writing

    check: Callable[[str], str] = getattr(writing, checker)
    try:
        return text if text is None else check(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_mpi(text: str) -> str:
    from mpiddl.sbatch.writing import MPIS

    if text not in MPIS:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(MPIS)}")
    return text
