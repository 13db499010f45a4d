"""Known traps of sbatch scripts. Each says what to write instead.

Sources: the manual pages of sbatch and srun, Slurm's opt.c (how directives are read), the notes of
its release 22.05 (``--cpus-per-task``), openmpi/ompi #11949 (GPUs that are bound), practice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from mpiddl.sbatch.script import Finding, Script, directive_words, read_script
from mpiddl.sbatch.shell import Command
from mpiddl.sbatch.signals import SIGNAL_FINDERS

__all__ = ["check_script"]

_BROKEN_DIRECTIVE = re.compile(r"#+\s*SBATCH\s*-|#(?i:sbatch)\s*-")  # `#  sbatch -N 2 x` is prose
_OWN_DEVICES = re.compile(r"CUDA_VISIBLE_DEVICES=\S*(LOCALID|PROCID|RANK)")
_ALL_GPUS = "--gpus-per-node=N --gpu-bind=none, and as many ranks per node"


def check_script(text: str) -> list[Finding]:
    """All traps of a script, in the order of its lines.

    Raises:
        ShellError: It is no shell script.
    """
    script = read_script(text)
    found = {finding for finder in _FINDERS for finding in finder(script)}
    return sorted(found)


def _dos_lines(script: Script) -> Iterator[Finding]:
    if "\r\n" in script.text:
        line = script.text[: script.text.index("\r\n")].count("\n") + 1
        yield Finding(line, "lines end as on DOS: sbatch refuses the script", "run dos2unix on it")


def _ineffective_directives(script: Script) -> Iterator[Finding]:
    for line, text, indented, late in script.comments:
        if text.startswith("#SBATCH") and not (late or indented):
            yield from _misread(line, text)
        elif not _BROKEN_DIRECTIVE.match(text):
            continue
        elif late:
            what = "stands below the first command, where Slurm reads no #SBATCH any more"
            yield Finding(line, what, "move it up")
        else:
            what = "is a plain comment to Slurm: a directive begins its line with #SBATCH"
            yield Finding(line, what, f"write #SBATCH {text[text.index('-') :].strip()}")


def _misread(line: int, text: str) -> Iterator[Finding]:
    words = directive_words(text)
    if words is None:
        yield Finding(line, "has a quote that is not closed: sbatch refuses it", "close it")
    elif words and not words[0].startswith("-") and words[0] not in ("hetjob", "packjob"):
        yield Finding(line, f"has no option: {words[0]}", f"write #SBATCH --{words[0]}")


def _variables_in_directives(script: Script) -> Iterator[Finding]:
    for line, name, value in script.directives:
        if re.search(r"\$[A-Za-z_{(]|`", value) or value.startswith("~"):
            yield Finding(
                line,
                f"--{name}={value} is taken as it stands: the shell does not read #SBATCH lines",
                "write it out, use %x, %j, %u in names of files, or pass it to sbatch itself",
            )


def _no_launch(script: Script) -> Iterator[Finding]:
    if script.launches or script.foreign or script.opaque or script.ranks == 1:
        return
    for command in script.commands:
        words = command.words
        if re.match(r"(.*/)?python[\d.]*$", words[0] if words else "") and any(
            word.endswith(".py") for word in words[1:]
        ):
            what = "is not started by srun or mpirun: one process trains alone"
            yield Finding(command.line, what, f"write srun --mpi=pmix {words[0]} ...")


def _no_mpi(script: Script) -> Iterator[Finding]:
    if _sets(script, "SLURM_MPI_TYPE"):
        return
    for launch in script.launches:
        if launch.is_srun and not _is_mpirun(launch.program):
            kind = launch.options.get("mpi")
            if kind in (None, "", "none"):
                yield Finding(
                    launch.command.line,
                    f"srun {'--mpi=none' if kind else 'without --mpi'}: ranks that do not find "
                    "each other train N times alone",
                    "write srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH, Intel MPI)",
                )


def _srun_mpirun(script: Script) -> Iterator[Finding]:
    for launch in script.launches:
        if launch.is_srun and _is_mpirun(launch.program):
            name = launch.program[0]
            yield Finding(
                launch.command.line,
                f"srun starts {name} once for each rank, and each starts all ranks",
                f'write srun --mpi=pmix python ..., or {name} -n "$SLURM_NTASKS" python ...',
            )


def _foreign_launchers(script: Script) -> Iterator[Finding]:
    for command, launcher in script.foreign:
        yield Finding(
            command.line,
            f"{launcher} starts processes that are no MPI ranks",
            "write srun --mpi=pmix python ..., one task for each rank",
        )


def _loops(script: Script) -> Iterator[Finding]:
    for launch in script.starts:
        called = script.calls(launch.command.function) if launch.command.function else []
        quiet = launch.options.get("input") == "none" or _NO_INPUT.search(" ".join(launch.words))
        if not quiet and any(_eats_lines(script, each) for each in [launch.command, *called]):
            yield Finding(
                launch.command.line,
                f"{launch.launcher} reads the lines that are meant for the loop's `read`, which "
                "then finds none: the loop runs once",
                "write </dev/null behind it",
            )


_NO_INPUT = re.compile(r"--?stdin[= ]none")


def _eats_lines(script: Script, command: Command) -> bool:
    """Whether it has the standard input of a loop in which a ``read`` wants the next line."""
    if command.has_input or command.background:  # bash gives what is in the background /dev/null
        return False
    return any(
        each.loops[-1] in command.loops and not each.has_input
        for each in script.calls("read")
        if each.loops and not any(re.match(r"-\w*u", word) for word in each.words)
    )


def _bound_gpus(script: Script) -> Iterator[Finding]:
    if not _ranks_share_nodes(script):
        return
    places = [(each.line, {each.name: each.value}) for each in script.directives]
    places += [(each.command.line, each.options) for each in script.launches if each.is_srun]
    is_unbound = any(
        "none" in options.get(name, "")
        for _, options in places
        for name in ("gpu-bind", "tres-bind")
    )
    for line, options in places:
        what = ""
        for name in ("gpus-per-task", "ntasks-per-gpu", "tres-per-task"):
            is_about_gpus = name != "tres-per-task" or "gpu" in options.get(name, "")
            if name in options and is_about_gpus and not is_unbound:
                what = f"--{name} lets each rank see its own GPU only"
        if options.get("gpu-bind", "none").split(",")[-1] != "none":
            what = f"--gpu-bind={options['gpu-bind']} lets each rank see its own GPU only"
        if what:
            yield Finding(line, f"{what}: CUDA IPC between ranks is lost", f"write {_ALL_GPUS}")


def _own_devices(script: Script) -> Iterator[Finding]:
    for command in script.commands:
        assigned = [f"{name}={value}" for name, value in command.assigned.items()]
        if any(_OWN_DEVICES.search(word) for word in [*command.words, *assigned]):
            yield Finding(
                command.line,
                "CUDA_VISIBLE_DEVICES differs from rank to rank: CUDA IPC between them is lost",
                "leave it out: mpiddl.init() takes the GPU of the local rank",
            )


def _no_tasks(script: Script) -> Iterator[Finding]:
    if script.asked("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket"):
        return
    names = {"ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket"}
    for launch in script.launches:
        if not (launch.is_srun and names & launch.options.keys()):
            yield Finding(
                launch.command.line,
                "nothing says how many ranks there are: Slurm takes one per node",
                "write #SBATCH --ntasks-per-node=N",
            )


def _mpirun_count(script: Script) -> Iterator[Finding]:
    for launch in script.launches:
        count = launch.options.get("ntasks", "")
        if not launch.is_srun and count.isdigit() and script.ranks not in (None, int(count)):
            yield Finding(
                launch.command.line,
                f"{launch.launcher} starts {count} ranks where the script asks for {script.ranks}",
                f'write {launch.launcher} -n "$SLURM_NTASKS"',
            )


def _cores(script: Script) -> Iterator[Finding]:
    asked = script.asked("cpus-per-task")
    if asked is None or asked.value == "1" or _sets(script, "SRUN_CPUS_PER_TASK"):
        return
    for launch in script.launches:
        if launch.is_srun and "cpus-per-task" not in launch.options:
            yield Finding(
                launch.command.line,
                f"srun does not inherit --cpus-per-task={asked.value} (since Slurm 22.05): each "
                "rank may get one core",
                'write srun --cpus-per-task="$SLURM_CPUS_PER_TASK"',
            )


def _threads(script: Script) -> Iterator[Finding]:
    if not script.launches or _sets(script, "OMP_NUM_THREADS"):
        return
    line = script.launches[0].command.line
    plain = [each.line for each in script.commands if "OMP_NUM_THREADS" in each.assigned]
    fix = 'write export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"'
    if plain:
        yield Finding(plain[0], "OMP_NUM_THREADS is not exported: ranks do not see it", fix)
    else:
        yield Finding(line, "OMP_NUM_THREADS is not set: each rank's libraries take all cores", fix)


def _sets(script: Script, variable: str) -> bool:
    """Whether programs see it: exported, set in front of one, or passed by an option."""
    return any(
        any(variable in word for word in command.words)
        or (variable in command.assigned and (command.words or re.search(_ALL_EXPORT, script.text)))
        for command in script.commands
    )


_ALL_EXPORT = re.compile(r"^\s*set\s+(-a|-o allexport)\b", re.MULTILINE)


def _is_mpirun(program: list[str]) -> bool:
    return (
        bool(program) and re.fullmatch(r"(.*/)?(mpirun|mpiexec(\.hydra)?)", program[0]) is not None
    )


def _ranks_share_nodes(script: Script) -> bool:
    alone = script.value("ntasks-per-node") == "1" or script.value("ntasks") == "1"
    return not alone and script.value("ntasks") != (script.value("nodes") or None)


_FINDERS: tuple[Callable[[Script], Iterator[Finding]], ...] = (
    _dos_lines,
    _ineffective_directives,
    _variables_in_directives,
    _no_launch,
    _no_mpi,
    _srun_mpirun,
    _foreign_launchers,
    _loops,
    _bound_gpus,
    _own_devices,
    _no_tasks,
    _mpirun_count,
    _cores,
    _threads,
    *SIGNAL_FINDERS,
)
