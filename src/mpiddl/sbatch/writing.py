"""Writes sbatch scripts that avoid the traps which ``sbatch_check`` looks for."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePath

__all__ = ["MPIS", "Batch", "check_name", "check_time", "quote", "write_script"]

MPIS = ("pmix", "pmi2", "mpirun")
SECONDS_TO_SAVE = 60
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: with what a job ends that has saved its state
MOST_RESTARTS = 100

_TIME = re.compile(r"(\d{1,7}|\d{1,5}-\d{1,7})(:\d{1,7}){0,2}")
_NAME = re.compile(r"[A-Za-z0-9][\w.+,-]*", re.ASCII)
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]*")


@dataclass(frozen=True)
class Batch:
    """What a script asks for.

    Args:
        program: What each rank runs, with its arguments.
        ranks_per_node: Default: as many as GPUs, else 1.
        gpus_per_node: All ranks of a node see all of them.
        cpus_per_rank: Cores, and threads of torch.
        time: In one of Slurm's forms, see ``check_time``.
        requeue: Save and queue again before the time is over; then go on with ``--resume``.
        mpi: ``pmix`` or ``pmi2``, srun's ``--mpi``; or ``mpirun``.
        name: Default: the program's.
    """

    program: tuple[str, ...]
    nodes: int = 1
    ranks_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_rank: int = 1
    time: str = "1:00:00"
    requeue: bool = False
    mpi: str = "pmix"
    partition: str | None = None
    account: str | None = None
    name: str | None = None


def check_time(text: str) -> str:
    """``text``, if Slurm takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: It does not, or it is no time at all (0 would be no limit).
    """
    if not _TIME.fullmatch(text):
        raise ValueError(
            f"{text!r} is no time; write minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S (1:30:00)"
        )
    if not re.search("[1-9]", text):
        raise ValueError(f"{text!r} is no time for a job; write 1:30:00")
    return text


def check_name(text: str) -> str:
    """``text``, if it needs no quotes in an #SBATCH line.

    Raises:
        ValueError: It is empty, or has other characters than names have.
    """
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no name; write letters, digits and . _ + , - only")
    return text


def quote(argument: str) -> str:
    r"""``argument`` as one word of bash, on one line.

    Newlines become ``\n`` within ``$'...'``: sbatch refuses scripts that have ``\r\n`` anywhere. So
    do bytes that are no UTF-8.
    """
    if _PRINTABLE.fullmatch(argument):
        return shlex.quote(argument)
    parts = []
    for character in argument:
        if character in "\\'":
            parts.append("\\" + character)
        elif _PRINTABLE.fullmatch(character):
            parts.append(character)
        else:
            named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
            parts.append(named or "".join(f"\\x{byte:02x}" for byte in os.fsencode(character)))
    return f"$'{''.join(parts)}'"


def write_script(batch: Batch) -> str:
    """The whole script.

    Raises:
        ValueError: A value is none that Slurm takes.
    """
    lines = [
        "#!/bin/bash",
        "# Written by `mpiddl slurm`: change the numbers here, or by sbatch's options.",
    ]
    for option, meaning in _options(batch):
        lines.append(f"#SBATCH {option:<26} # {meaning}" if meaning else f"#SBATCH {option}")
    lines += ["set -euo pipefail", ""]
    if batch.requeue:
        lines += [f"MOST_RESTARTS={MOST_RESTARTS:<32} # then the job fails", ""]
    lines += [
        "# The environment is that of the shell which calls sbatch; or load modules here.",
        "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK    # torch's threads a rank",
        "",
    ]
    program = " ".join(map(quote, batch.program))
    if batch.requeue and "--resume" not in batch.program:
        program += " --resume"
    launch = f"{_why(batch)}\n{_launcher(batch)} \\\n    {program}"
    lines.append(_requeueing(launch, batch.mpi) if batch.requeue else launch)
    return "\n".join(lines) + "\n"


def _options(batch: Batch) -> list[tuple[str, str]]:
    """For Slurm, and what they mean."""
    gpus = batch.gpus_per_node
    ranks = (gpus or 1) if batch.ranks_per_node is None else batch.ranks_per_node
    for number in (batch.nodes, ranks, batch.cpus_per_rank, 1 if gpus is None else gpus):
        if number < 1:
            raise ValueError(f"{number} is no count; write 1 or more")
    found = [(f"--job-name={check_name(batch.name or _name_of(batch.program))}", "")]
    if batch.partition is not None:
        found.append((f"--partition={check_name(batch.partition)}", ""))
    if batch.account is not None:
        found.append((f"--account={check_name(batch.account)}", ""))
    found.append((f"--nodes={batch.nodes}", ""))
    found.append((f"--ntasks-per-node={ranks}", "ranks a node"))
    if gpus is not None:
        found.append(
            (f"--gpus-per-node={gpus}", "not --gpus-per-task, which hides those of others")
        )
        if batch.mpi == "mpirun":
            found.append(("--gpu-bind=none", "each rank sees all GPUs of its node"))
    found.append((f"--cpus-per-task={batch.cpus_per_rank}", "cores a rank"))
    found.append((f"--time={check_time(batch.time)}", "of one start" if batch.requeue else ""))
    if batch.requeue:
        warning = f"--signal=B:USR1@{SECONDS_TO_SAVE}"
        found.append((warning, "to this shell, 60 s before the end; Slurm may send it at 120 s"))
        found.append(("--requeue", "the job may be started again"))
        found.append(("--open-mode=append", "each start adds to the output"))
    found.append(("--output=%x-%j.out", "%x is the job's name, %j its number"))
    return found


def _name_of(program: tuple[str, ...]) -> str:
    """Of the script, else of the program: ``python jobs/digits.py`` -> ``digits``."""
    script = next((word for word in program if word.endswith(".py")), program[0])
    return re.sub(r"[^A-Za-z0-9.]+", "-", PurePath(script).stem).strip("-.") or "mpiddl"


def _launcher(batch: Batch) -> str:
    if batch.mpi not in MPIS:
        raise ValueError(f"{batch.mpi!r} is none of {', '.join(MPIS)}")
    if batch.mpi == "mpirun":
        return 'mpirun -n "$SLURM_NTASKS" --bind-to none'
    bind = "" if batch.gpus_per_node is None else " --gpu-bind=none"
    cores = '--cpus-per-task="$SLURM_CPUS_PER_TASK"'
    kills = 0 if batch.requeue and batch.mpi == "pmix" else 1
    return f"srun --mpi={batch.mpi}{bind} {cores} --kill-on-bad-exit={kills}"


def _why(batch: Batch) -> str:
    """What is said of the launcher's options."""
    if batch.mpi == "mpirun":
        return "# By itself mpirun binds each rank to one core, for all its threads."
    lines = ["# srun does not take --cpus-per-task from above since Slurm 22.05."]
    if batch.gpus_per_node is not None:
        lines.append(
            "# Each rank sees all GPUs of its node: bound to one, it could not read others' memory."
        )
    if batch.mpi == "pmi2":
        lines.append(
            "# Without --kill-on-bad-exit the others would wait for a rank that was killed."
        )
    elif batch.requeue:
        lines.append(
            "# Not --kill-on-bad-exit=1: the first rank to leave would have the others killed."
        )
    return "\n".join(lines)


def _requeueing(launch: str, mpi: str) -> str:
    """The launch behind the shell, which waits for the signal and for the ranks."""
    launcher = "mpirun" if mpi == "mpirun" else "srun"
    return f"""\
# The signal comes to this shell, which hands it on to {launcher}, which hands it on to the ranks.
# They save a checkpoint and leave with status {TRY_AGAIN}; the job is queued again and goes on.
signals=0
step=
hand_on() {{
    signals=$((signals + 1))
    kill -USR1 "$step" 2>/dev/null || true
}}
trap hand_on USR1

{launch} &
step=$!

# A signal ends `wait` too, and not {launcher}: wait again.
seen=-1
while [ "$seen" != "$signals" ]; do
    seen=$signals
    status=0
    wait "$step" || status=$?
done

# {TRY_AGAIN}: a checkpoint is saved. Over 128: the signal killed the program while that was
# starting, or the first rank to leave had the others killed.
if [ "$status" = {TRY_AGAIN} ] || {{ [ "$signals" -gt 0 ] && [ "$status" -gt 128 ]; }}; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -ge "$MOST_RESTARTS" ]; then
        echo "started $((MOST_RESTARTS + 1)) times: giving up" >&2
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
""".rstrip()
