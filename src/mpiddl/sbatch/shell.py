"""Reads a bash script into its commands: their words and lines, and what surrounds them.

As much of bash as a check of job scripts needs; expressions in ``((...))`` and ``[[...]]`` come out
as odd commands, which nobody takes for a launcher. (bashlex, the parser on PyPI, is under the GPL,
and reads no here-document whose delimiter is quoted.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mpiddl.sbatch.lexer import Comment, Lexer, Token

__all__ = ["Command", "read_commands"]

_DOCUMENTS = {"<<", "<<-"}  # their targets are read already
_INPUTS = {"<", "<&", "<>", "<<<", *_DOCUMENTS}
_REDIRECTIONS = {">", ">>", ">&", "&>", "&>>", ">|", *_INPUTS}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[[^]]*\])?(\+?)=(.*)", re.DOTALL)
_CLOSERS = {"if": "fi", "while": "done", "until": "done", "for": "done", "select": "done"}
_CLOSERS |= {"case": "esac", "{": "}", "(": ")"}
_CONDITIONS = {"if", "elif", "while", "until"}
_NO_COMMANDS = {"for", "select", "case"}  # words follow up to the next line or `;`
_PREFIXES = {"then", "do", "else", "time", "!"}


@dataclass
class Command:
    """A simple command.

    Attributes:
        words: Without quotes, assignments and redirections.
        assigned: ``NAME=value`` in front; an array's words as a list; ``NAME+`` where it is added.
        function: The function in whose body it stands.
        background: An ``&`` follows it, or the list or group that it is part of.
        piped: Its output goes into another command, which makes the status.
        checked: Its status decides what runs next: a condition, or a ``||`` follows.
        has_input: Its standard input is redirected, or a pipe that no loop around it reads.
        loops: The loops around it, by number, the innermost last.
    """

    line: int
    words: list[str] = field(default_factory=list)
    assigned: dict[str, str | list[str]] = field(default_factory=dict)
    function: str | None = None
    background: bool = False
    piped: bool = False
    checked: bool = False
    has_input: bool = False
    loops: tuple[int, ...] = ()

    @property
    def repeated(self) -> bool:
        """Whether it stands in a loop."""
        return bool(self.loops)


@dataclass
class _Group:
    """``closer`` ends it. Around it, a list and a part of a pipe had begun at these commands."""

    closer: str
    list_start: int
    part_start: int
    function: str | None
    number: int


def read_commands(text: str) -> tuple[list[Command], list[Comment]]:
    """All commands in the order of the file, and all lines that are comments.

    Raises:
        ShellError: A quote, a bracket or a here-document does not end.
    """
    lexer, reader = Lexer(text), _Reader()
    for token in lexer.tokens():
        if token.is_word:
            reader.take_word(token)
        else:
            reader.take_operator(token)
    reader.end_command()
    return reader.commands, lexer.comments


class _Reader:
    def __init__(self) -> None:
        self.commands: list[Command] = []
        self._command: Command | None = None
        self._groups: list[_Group] = []
        # The commands from here on are what a following `&` or `||`, or a `|`, is about.
        self._list_start = self._part_start = 0
        self._in_condition = self._is_skipping = self._wants_target = False
        self._opened = 0
        self._after_pipe = False
        self._function: str | None = None  # its body comes next
        self._in_parameters = self._after_parameters = False  # the () behind its name

    def take_word(self, token: Token) -> None:
        """Part of a command, unless bash reserves it."""
        if self._wants_target:
            self._wants_target = False
        elif self._is_skipping:
            self._is_skipping = token.text not in ("do", "in") or self._groups[-1].closer != "esac"
        elif self._command is None and self._is_reserved(token):
            pass
        else:
            if self._command is None:
                self._command = Command(
                    token.line,
                    function=self._inside,
                    checked=self._in_condition,
                    has_input=self._after_pipe,
                    loops=tuple(each.number for each in self._groups if each.closer == "done"),
                )
            self._after_pipe = False
            found = None if self._command.words else _ASSIGNMENT.fullmatch(token.text)
            if found:
                name, more, value = found.groups()
                words = value if token.array is None else token.array
                self._command.assigned[name + more] = words
            else:
                self._command.words.append(token.text)

    def take_operator(self, token: Token) -> None:
        """What ends a command, redirects it, or groups some."""
        operator = token.text
        if self._is_testing:
            pass
        elif operator in _REDIRECTIONS:
            self._wants_target = operator not in _DOCUMENTS
            if operator in _INPUTS and self._command is not None:
                self._command.has_input = True
        elif operator == "(":
            self._open_bracket()
        elif operator == ")":
            self._close_bracket()
        else:
            self.end_command()
            self._is_skipping = False
            if operator == "&":
                for command in self.commands[self._list_start :]:
                    command.background = True
            elif operator == "||":
                for command in self.commands[self._list_start :]:
                    command.checked = True
            elif operator in ("|", "|&"):
                for command in self.commands[self._part_start :]:
                    command.piped = True
            if operator not in ("&&", "||", "|", "|&"):
                self._list_start = len(self.commands)
            self._part_start = len(self.commands)
            self._after_pipe = operator in ("|", "|&") or (operator == "\n" and self._after_pipe)

    def end_command(self) -> None:
        """Also where nothing has begun."""
        if self._command is not None:
            self.commands.append(self._command)
        self._command = None

    @property
    def _is_testing(self) -> bool:
        """Between ``[[`` and ``]]`` operators mean something else."""
        words = self._command.words if self._command is not None else []
        return words[:1] == ["[["] and words[-1] != "]]"

    @property
    def _inside(self) -> str | None:
        return next((group.function for group in reversed(self._groups) if group.function), None)

    def _is_reserved(self, token: Token) -> bool:
        word = token.text
        if word == "function":
            self._function = ""  # the next word names it
        elif self._function == "" and word != "{":
            self._function = word
        elif word in _CLOSERS:
            self._open(word)
        elif self._groups and word == self._groups[-1].closer:
            self._close()
        elif word == "elif":
            self._in_condition = True
        elif word in _PREFIXES:
            self._in_condition = self._in_condition and word in ("time", "!")
        else:
            return False
        return True

    def _open(self, word: str) -> None:
        function, self._function, self._after_parameters = self._function, None, False
        self._groups.append(
            _Group(
                _CLOSERS[word],
                self._list_start,
                self._part_start,
                function or None,
                self._opened,
            )
        )
        self._opened += 1
        self._after_pipe = False
        self._list_start = self._part_start = len(self.commands)
        self._is_skipping = word in _NO_COMMANDS
        self._in_condition = self._in_condition or word in _CONDITIONS

    def _close(self) -> None:
        group = self._groups.pop()
        self._list_start, self._part_start = group.list_start, group.part_start

    def _open_bracket(self) -> None:
        if self._command is not None and len(self._command.words) == 1:  # name() {
            self._function = self._command.words[0]
            self._command = None
        if self._function and not self._after_parameters:
            self._in_parameters = self._after_parameters = True
        elif self._command is None and not self._is_skipping:
            self._open("(")

    def _close_bracket(self) -> None:
        if self._in_parameters:
            self._in_parameters = False
        elif self._groups and self._groups[-1].closer == ")":
            self.end_command()
            self._close()
        elif self._groups and self._groups[-1].closer == "esac":
            self._command = None  # what a case looks for
