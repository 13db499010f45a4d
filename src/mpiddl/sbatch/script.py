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

__all__ = ["Directive", "Finding", "Launch", "Script", "directive_words", "read_script"]

MPIRUNS = {"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun"}
_WRAPPERS = {"exec", "command", "time", "env", "nohup", "nice", "timeout", "stdbuf", "numactl"}
# Started by srun for their own sake: no ranks. (What env or numactl starts may be ranks.)
_HELPER = re.compile(
    r"hostname|cat|chmod|cp|date|df|du|echo|free|ls|lscpu|mkdir|mv|nproc|nvidia-smi|printenv|pwd"
    r"|rm|rmdir|rsync|sleep|tar|touch|true|uname|uptime"
)
_LONG_NAMES = {
    "n": "ntasks",
    "N": "nodes",
    "c": "cpus-per-task",
    "G": "gpus",
    "K": "kill-on-bad-exit",
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
    """

    command: Command
    launcher: str
    options: dict[str, str]
    words: list[str]
    program: list[str]
    replaces_shell: bool

    @property
    def is_srun(self) -> bool:
        return self.launcher == "srun"


@dataclass(frozen=True)
class Script:
    """What a check looks at.

    Attributes:
        directives: Those that Slurm reads, in order.
        opaque: Some command is named by a variable, so launches may be missing.
    """

    text: str
    shebang: str
    directives: list[Directive]
    comments: list[Comment]
    commands: list[Command]
    launches: list[Launch]
    opaque: bool

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
    launches, opaque = [], False
    for command in commands:
        words = _substituted(command.words, constants)
        opaque = opaque or any(word.startswith("$") for word in words[:1])
        launch = _launch_in(command, words)
        launches += [launch] if launch else []
    return Script(text, shebang, directives, comments, commands, launches, opaque)


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
            if not equals and name not in _FLAGS and rest and not rest[0].startswith("-"):
                value = rest.pop(0)
            found.append((name, value))
        elif len(word) > 1 and word.startswith("-"):
            letter, value = word[1], word[2:].removeprefix("=")
            if not value and letter not in _WITHOUT_VALUE and rest:
                value = rest.pop(0)
            found.append((_LONG_NAMES.get(letter, letter), value))
    return found, rest


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
        if (
            not program
            or _HELPER.fullmatch(PurePath(program[0]).name)
            or options.get("ntasks") == "1"
        ):
            return None
    else:
        options, program = _mpirun_options(arguments)
    return Launch(command, launcher, options, words[place:], program, "exec" in names[:place])


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
    """With what variables are known to hold."""
    result = []
    for word in words:
        whole = _VARIABLE.fullmatch(word)
        name = (whole.group(1) or whole.group(2)) if whole else ""
        if name in constants:
            values = constants[name]
            result += values if len(values) != 1 else values[0].split() or [""]
        else:
            result.append(_VARIABLE.sub(lambda found: _scalar(found, constants), word))
    return result


def _scalar(found: re.Match[str], constants: dict[str, list[str]]) -> str:
    values = constants.get(found.group(1) or found.group(2), [])
    return values[0] if len(values) == 1 else found.group()
