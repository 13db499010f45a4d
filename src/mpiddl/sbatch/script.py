"""An sbatch script, read: what it asks Slurm for, and where it starts ranks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from mpiddl.sbatch.lexer import Comment, ShellError
from mpiddl.sbatch.shell import Command, read_commands

__all__ = ["Directive", "Finding", "Foreign", "Launch", "Script", "directive_words", "read_script"]

MPIRUNS = {"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun"}
_WRAPPERS = {"exec", "command", "time", "env", "nohup", "nice", "timeout", "stdbuf", "numactl"}
_CONTAINERS = {"singularity", "apptainer", "shifter", "ch-run", "enroot", "podman", "docker"}
_SHELLS = {"bash", "sh", "dash", "zsh", "ksh"}
# Started by srun for their own sake: no ranks. (What env or numactl starts may be ranks.)
_HELPER = re.compile(
    r"hostname|cat|chmod|cp|date|df|du|echo|free|ls|lscpu|mkdir|mv|nproc|nvidia-smi|printenv|pwd"
    r"|rm|rmdir|rsync|sleep|tar|touch|true|uname|uptime"
)
# How launchers of other frameworks are called, and the option by which they start MPI ranks.
_FOREIGN = (
    (r"torchrun|-m torch\.distributed\.(?:run|launch)", None),
    (r"horovodrun|-m horovod\.runner(?:\.\w+)?", "--mpi"),
    (r"deepspeed|-m deepspeed\.launcher\.\w+", "--launcher[= ](openmpi|mpich|impi|mvapich|slurm)"),
    (r"accelerate[ -]launch|-m accelerate\.commands\.(?:launch|\w+ launch)", "--mpirun_hostfile"),
    (r"(?:fabric|lightning|colossalai) run", None),
)
_FOREIGN_NAME = re.compile(
    r"torchrun|horovodrun|deepspeed|accelerate(-launch)?|fabric|lightning|colossalai"
)
_PYTHON = re.compile(r"python[\d.]*")
_LONG_NAMES = {
    "n": "ntasks",
    "N": "nodes",
    "c": "cpus-per-task",
    "G": "gpus",
    "K": "kill-on-bad-exit",
    "i": "input",
}
_WITHOUT_VALUE = set("HIKOQXZhklsuvV")
_FLAGS = {
    "contiguous",
    "disable-status",
    "exact",
    "exclusive",
    "hold",
    "immediate",
    "interactive",
    "kill-on-bad-exit",
    "label",
    "multi-prog",
    "no-kill",
    "no-requeue",
    "overcommit",
    "overlap",
    "oversubscribe",
    "preserve-env",
    "pty",
    "quiet",
    "reboot",
    "requeue",
    "spread-job",
    "unbuffered",
    "use-min-nodes",
    "verbose",
    "whole",
}
# Options that checks ask for. Slurm takes any abbreviation that no two options share.
_KNOWN = _FLAGS | {
    "cpus-per-task",
    "gpu-bind",
    "gpus",
    "gpus-per-task",
    "input",
    "mpi",
    "nodes",
    "ntasks",
    "ntasks-per-gpu",
    "ntasks-per-node",
    "ntasks-per-socket",
    "open-mode",
    "signal",
    "tasks-per-node",
    "tres-bind",
    "tres-per-task",
}
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?\})")


class Finding(NamedTuple):
    """A trap, and what to write instead."""

    line: int
    what: str
    fix: str


class Directive(NamedTuple):
    """``#SBATCH --name=value``; a flag has no value."""

    line: int
    name: str
    value: str


@dataclass(frozen=True)
class Launch:
    """Where ranks are started.

    Attributes:
        launcher: ``srun``, ``mpirun``, ``mpiexec`` or another name of theirs.
        options: Of the launcher, by their long names; what mpirun has but its count, it has not.
        words: The launcher as it is called, and all that follows.
        program: What it starts.
        replaces_shell: ``exec`` stands in front.
        is_helper: What it starts is no training: a ``hostname``, or one task.
    """

    command: Command
    launcher: str
    options: dict[str, str]
    words: list[str]
    program: list[str]
    replaces_shell: bool
    is_helper: bool

    @property
    def is_srun(self) -> bool:
        return self.launcher == "srun"


class Foreign(NamedTuple):
    """Where a launcher that knows nothing of MPI starts processes."""

    command: Command
    launcher: str


@dataclass(frozen=True)
class Script:
    """What a check looks at.

    Attributes:
        directives: Those that Slurm reads, in order.
        starts: All calls of srun and mpirun.
        foreign: Calls of other frameworks' launchers.
        opaque: Some command is named by a variable, so launches may be missing.
    """

    text: str
    shebang: str
    directives: list[Directive]
    comments: list[Comment]
    commands: list[Command]
    starts: list[Launch]
    foreign: list[Foreign]
    opaque: bool

    @property
    def launches(self) -> list[Launch]:
        """Where the ranks are started."""
        return [each for each in self.starts if not each.is_helper]

    def asked(self, *names: str) -> Directive | None:
        """The last directive of one of these names: it counts."""
        return next((each for each in reversed(self.directives) if each.name in names), None)

    def value(self, name: str) -> str:
        """Of the directive; empty without."""
        directive = self.asked(name)
        return directive.value if directive else ""

    @property
    def ranks(self) -> int | None:
        """How many Slurm will count, where the script says it in plain numbers."""
        total, nodes = self.value("ntasks"), self.value("nodes") or "1"
        if total.isdigit():
            return int(total)
        each = self.value("ntasks-per-node")
        return int(each) * int(nodes) if each.isdigit() and nodes.isdigit() else None

    def calls(self, function: str) -> list[Command]:
        """Commands that are this function's name."""
        return [command for command in self.commands if command.words[:1] == [function]]


def read_script(text: str) -> Script:
    """Take a script apart.

    Raises:
        ShellError: It is no shell script.
    """
    shebang = text.split("\n", 1)[0]
    if not re.match(r"#!\s*\S*/(env\s+(-S\s+)?)?(ba|da|z|k)?sh\b", shebang):
        raise ShellError("its first line is not that of a shell script; write #!/bin/bash")
    commands, comments = read_commands(text.replace("\r\n", "\n"))
    directives = [
        Directive(comment.line, name, value)
        for comment in comments
        if comment.text.startswith("#SBATCH") and not (comment.late or comment.indented)
        for name, value in _options(directive_words(comment.text) or [], positionals=False)[0]
    ]
    constants = _constants(commands)
    starts, foreign, opaque = [], [], False
    for command in commands:
        words = _substituted(command.words, constants)
        opaque = opaque or any(word.startswith("$") for word in words[:1])
        launch, other = _launch_in(command, words), _foreign_launcher(words)
        starts += [launch] if launch else []
        foreign += [Foreign(command, other)] if other else []
    return Script(text, shebang, directives, comments, commands, starts, foreign, opaque)


def directive_words(line: str) -> list[str] | None:
    """As Slurm cuts them: quotes count, ``#`` begins a comment; None if a quote is not closed."""
    try:
        return shlex.split(line.removeprefix("#SBATCH"), comments=True)
    except ValueError:
        return None


def _options(
    words: Sequence[str], positionals: bool = True
) -> tuple[list[tuple[str, str]], list[str]]:
    """Options by their long names, and what follows them."""
    found: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--" or (not word.startswith("-") and positionals):
            return found, rest if word == "--" else [word, *rest]
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = _in_full(name)
            if not equals and name not in _FLAGS and rest and not rest[0].startswith("-"):
                value = rest.pop(0)
            found.append((name, value))
        elif len(word) > 1 and word.startswith("-"):
            letter, value = word[1], word[2:].removeprefix("=")
            if not value and letter not in _WITHOUT_VALUE and rest:
                value = rest.pop(0)
            found.append((_LONG_NAMES.get(letter, letter), value))
    return found, rest


def _in_full(name: str) -> str:
    """``"tasks"`` -> ``"ntasks-per-node"``, whose other name, ``tasks-per-node``, it begins."""
    found = [name] if name in _KNOWN else [each for each in _KNOWN if each.startswith(name)]
    name = found[0] if len(found) == 1 else name
    return "ntasks-per-node" if name == "tasks-per-node" else name


def _launch_in(command: Command, words: list[str]) -> Launch | None:
    """The launch that a command is, also behind ``exec`` or ``timeout 60``."""
    names = [PurePath(word).name for word in words]
    place = 0
    if names and names[0] in _WRAPPERS:
        place = next((at for at, name in enumerate(names) if name in {"srun", *MPIRUNS}), 0)
    if not names or names[place] not in {"srun", *MPIRUNS}:
        return None
    launcher, arguments = names[place], words[place + 1 :]
    if launcher == "srun":
        pairs, program = _options(arguments)
        options = dict(pairs)
        is_helper = (
            not program
            or _HELPER.fullmatch(PurePath(program[0]).name) is not None
            or options.get("ntasks") == "1"
        )
    else:
        options, program = _mpirun_options(arguments)
        is_helper = False
    replaces_shell = "exec" in names[:place]
    return Launch(command, launcher, options, words[place:], program, replaces_shell, is_helper)


def _foreign_launcher(words: list[str]) -> str | None:
    """The framework's launcher that a command calls, also behind ``srun`` or in ``bash -c``."""
    name = PurePath(words[0]).name if words else ""
    if name == "srun":
        return _foreign_launcher(_options(words[1:])[1])
    if name in _SHELLS:
        return _foreign_in_shell(words[1:])
    if name in MPIRUNS | _WRAPPERS | _CONTAINERS:
        places = (at for at, word in enumerate(words) if at and _may_start(word))
        return _foreign_launcher(words[next(places, len(words)) :])
    call = " ".join(words[1:] if _PYTHON.fullmatch(name) else [name, *words[1:]])
    for pattern, by_mpi in _FOREIGN:
        if found := re.match(rf"({pattern})(?=\s|$)", call):
            is_mpi = by_mpi and re.search(rf"\s{by_mpi}(\s|=|$)", call)
            return None if is_mpi else found.group(1).removeprefix("-m ")
    return None


def _foreign_in_shell(words: list[str]) -> str | None:
    """The first such launcher in the text behind ``bash -c``."""
    text = next((words[at + 1] for at, word in enumerate(words[:-1]) if _RUNS_TEXT(word)), "")
    try:
        commands = read_commands(text)[0]
    except ShellError:
        return None
    return next(filter(None, (_foreign_launcher(each.words) for each in commands)), None)


_RUNS_TEXT = re.compile(r"-[a-z]*c").fullmatch


def _may_start(word: str) -> bool:
    """Whether a program that ``mpirun`` or ``env`` starts begins here."""
    name = PurePath(word).name
    is_known = name in {"srun", *MPIRUNS, *_SHELLS}
    return is_known or bool(_PYTHON.fullmatch(name) or _FOREIGN_NAME.fullmatch(name))


def _mpirun_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Launchers differ in what takes how many values; the count is named alike by all."""
    options: dict[str, str] = {}
    for at, word in enumerate(words):
        if re.match(r"python|mpiddl|torchrun", PurePath(word).name) or word.endswith(
            (".py", ".sh")
        ):
            return options, words[at:]
        if word.lstrip("-") in ("n", "np") and word.startswith("-") and at + 1 < len(words):
            options["ntasks"] = words[at + 1]
    return options, []


def _constants(commands: list[Command]) -> dict[str, list[str]]:
    """Variables that are set once, by their words."""
    found: dict[str, list[str]] = {}
    changing = set()
    for command in commands:
        if command.words and command.words[0] not in ("export", "readonly", "declare", "local"):
            continue
        assigned = dict(command.assigned)
        assigned |= {
            name: value
            for name, equals, value in (word.partition("=") for word in command.words[1:])
            if equals
        }
        for name, value in assigned.items():
            words = [value] if isinstance(value, str) else value
            if name.endswith("+"):
                found[name[:-1]] = [*found.get(name[:-1], []), *words]
            elif name in found:
                changing.add(name)
            else:
                found[name] = words
    return {name: words for name, words in found.items() if name not in changing}


def _substituted(words: list[str], constants: dict[str, list[str]]) -> list[str]:
    """With what variables are known to hold, and what those hold in turn."""
    result: list[str] = []
    for word in words:
        whole = _VARIABLE.fullmatch(word)
        name = (whole.group(1) or whole.group(2)) if whole else ""
        if name in constants:
            values = constants[name]
            held = values if len(values) != 1 else values[0].split() or [""]
            result += _substituted(held, _without(name, constants))
        else:
            result.append(_VARIABLE.sub(lambda found: _scalar(found, constants), word))
    return result


def _scalar(found: re.Match[str], constants: dict[str, list[str]]) -> str:
    name = found.group(1) or found.group(2)
    values = constants.get(name, [])
    if len(values) != 1:
        return found.group()
    rest = _without(name, constants)
    return _VARIABLE.sub(lambda inner: _scalar(inner, rest), values[0])


def _without(name: str, constants: dict[str, list[str]]) -> dict[str, list[str]]:
    """All others: what ``PATH=/opt:$PATH`` holds is taken once."""
    return {other: values for other, values in constants.items() if other != name}
