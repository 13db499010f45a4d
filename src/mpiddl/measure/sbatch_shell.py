"""Reads a bash script into its commands: their words and lines, and what surrounds them.

As much of bash as a check of job scripts needs. Nothing is run or expanded: ``$NAME`` and
``$(...)`` stay as they are written. Expressions in ``((...))`` and ``[[...]]`` come out as odd
commands, which nobody takes for a launcher. (bashlex, the parser on PyPI, is under the GPL, and
reads no here-document whose delimiter is quoted.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Command", "Comment", "ShellError", "read_commands"]

_OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|<<<|<<-|<<|>>|<&|>&|&>>|&>|<>|>\||[;&|()<>\n]")
_REDIRECTIONS = {"<", ">", ">>", "<&", ">&", "&>", "&>>", "<>", ">|", "<<<"}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[[^]]*\])?(\+?)=(.*)", re.DOTALL)
_OPENERS = {"if": "fi", "while": "done", "until": "done", "for": "done", "select": "done"}
_CLOSERS = {"fi", "done", "esac", "}"}
_CONDITIONS = {"if", "elif", "while", "until"}
_ENDS_OF_CONDITIONS = {"then", "do", "else"}


class ShellError(ValueError):
    """What is read is not bash."""


class Comment(NamedTuple):
    """From the ``#`` on; ``indented`` says whether blanks stand in front, on a line of its own."""

    line: int
    text: str
    indented: bool
    commands_before: int


@dataclass
class Command:
    """A simple command.

    Attributes:
        words: Without quotes, assignments and redirections.
        assigned: ``NAME=value`` in front; an array's words as a list, ``+=`` as the name's end.
        function: The function in whose body it stands.
        background: An ``&`` follows it, or the list or group that it is part of.
        piped: Its output goes into another command, which makes the status.
        checked: Its status decides what runs next: a condition, or a ``||`` follows.
        repeated: It stands in a loop.
    """

    line: int
    words: list[str] = field(default_factory=list)
    assigned: dict[str, str | list[str]] = field(default_factory=dict)
    function: str | None = None
    background: bool = False
    piped: bool = False
    checked: bool = False
    repeated: bool = False


class _Token(NamedTuple):
    line: int
    text: str
    is_word: bool
    array: list[str] | None = None


@dataclass
class _Group:
    """``closer`` ends it; where its list and its part of a pipe began."""

    closer: str
    list_start: int
    part_start: int
    function: str | None = None


def read_commands(text: str) -> tuple[list[Command], list[Comment]]:
    """All commands in the order of the file, and all comments.

    Raises:
        ShellError: A quote, a bracket or a here-document does not end.
    """
    reader = _Reader(text)
    for token in reader.lexer.tokens():
        reader.take(token)
    reader.end_command("\n")
    return reader.commands, reader.lexer.comments


class _Lexer:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.comments: list[Comment] = []
        self.commands_before = 0  # the reader counts
        self._documents: list[tuple[str, bool]] = []

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def tokens(self, until: str = "") -> Iterator[_Token]:
        """Words and operators, up to the operator ``until``."""
        while self.at < len(self.text):
            if blank := re.compile(r"[ \t\r]+|\\\n").match(self.text, self.at):
                self.at = blank.end()
            elif self.text[self.at] == "#":
                self._comment()
            elif self.text.startswith(("<(", ">("), self.at):
                yield _Token(self.line, self._word(), True)
            elif operator := _OPERATOR.match(self.text, self.at):
                line, self.at = self.line, operator.end()
                if operator.group() == until:
                    return
                if operator.group() in ("<<", "<<-"):
                    self._expect_document(operator.group() == "<<-")
                    continue
                if operator.group() == "\n":
                    self._skip_documents()
                yield _Token(line, operator.group(), False)
            else:
                yield from self._word_or_array()
        if until:
            raise ShellError(f"a {until!r} is missing")

    def _comment(self) -> None:
        begin = self.text.rfind("\n", 0, self.at) + 1
        end = self.text.find("\n", self.at)
        end = len(self.text) if end < 0 else end
        before = self.text[begin : self.at]
        if not before.strip():
            text = self.text[self.at : end]
            self.comments.append(Comment(self.line, text, bool(before), self.commands_before))
        self.at = end

    def _word_or_array(self) -> Iterator[_Token]:
        line, word = self.line, self._word()
        if self.text.startswith("(", self.at) and re.fullmatch(r"[A-Za-z_]\w*\+?=", word):
            self.at += 1
            words = [token.text for token in self.tokens(until=")") if token.is_word]
            yield _Token(line, word, True, words)
        elif not (word.isdigit() and self.text.startswith(("<", ">"), self.at)):  # 2> is no word
            yield _Token(line, word, True)

    def _word(self) -> str:
        """Up to a blank or an operator, without quotes."""
        parts = []
        while self.at < len(self.text):
            rest = self.text[self.at]
            if rest in " \t\r\n;&|":
                break
            if rest in "<>()":
                if not self.text.startswith(("<(", ">("), self.at) or parts:
                    break
                parts.append(rest)
                self.at += 1
                parts.append(self._brackets("(", ")"))
            elif rest == "'":
                parts.append(self._up_to("'"))
            elif rest == '"':
                parts.append(self._double_quoted())
            elif rest == "\\":
                escaped = self.text[self.at + 1 : self.at + 2]
                parts.append("" if escaped == "\n" else escaped)
                self.at += 2
            elif rest in "$`":
                parts.append(self._expansion())
            else:
                parts.append(rest)
                self.at += 1
        return "".join(parts)

    def _up_to(self, quote: str, escapes: bool = False) -> str:
        """The text between two ``quote``s, the first of which is here."""
        body = r"(?:\\.|[^\\Q])*" if escapes else "[^Q]*"
        pattern = f"Q({body})Q".replace("Q", quote)
        found = re.compile(pattern, re.DOTALL).match(self.text, self.at)
        if found is None:
            raise ShellError(f"the {quote} in line {self.line} is not closed")
        self.at = found.end()
        return found.group(1)

    def _double_quoted(self) -> str:
        begin, parts = self.line, []
        self.at += 1
        while self.at < len(self.text):
            rest = self.text[self.at]
            if rest == '"':
                self.at += 1
                return "".join(parts)
            if rest == "\\":
                pair = self.text[self.at : self.at + 2]
                kept = {"\\\n": ""}.get(pair, pair[1:] if pair[1:] in '$`"\\' else pair)
                parts.append(kept)
                self.at += 2
            elif rest in "$`":
                parts.append(self._expansion(quoted=True))
            else:
                parts.append(rest)
                self.at += 1
        raise ShellError(f'the " in line {begin} is not closed')

    def _expansion(self, quoted: bool = False) -> str:
        """``$NAME``, ``${...}``, ``$(...)`` or `` `...` ``, as it is written."""
        if self.text[self.at] == "`":
            return f"`{self._up_to('`', escapes=True)}`"
        self.at += 1
        following = self.text[self.at : self.at + 1]
        if following == "(":
            return "$" + self._brackets("(", ")")
        if following == "{":
            return "$" + self._brackets("{", "}")
        if following == "'" and not quoted:
            return self._up_to("'", escapes=True)
        name = re.compile(r"\w+|[#?!@*$-]|").match(self.text, self.at)
        assert name is not None
        self.at = name.end()
        return "$" + name.group()

    def _brackets(self, opening: str, closing: str) -> str:
        """From here to the bracket that closes; quotes within count."""
        begin, line, depth = self.at, self.line, 0
        while self.at < len(self.text):
            rest = self.text[self.at]
            if rest == "'":
                self._up_to("'")
            elif rest == '"':
                self._double_quoted()
            else:
                self.at += 2 if rest == "\\" else 1
                depth += (rest == opening) - (rest == closing)
                if depth == 0:
                    return self.text[begin : self.at]
        raise ShellError(f"the {opening} in line {line} is not closed")

    def _expect_document(self, tabs: bool) -> None:
        blank = re.compile(r"[ \t]*").match(self.text, self.at)
        assert blank is not None
        self.at = blank.end()
        self._documents.append((self._word(), tabs))

    def _skip_documents(self) -> None:
        for delimiter, tabs in self._documents:
            start = self.line
            while True:
                if self.at >= len(self.text):
                    raise ShellError(f"the text that ends at {delimiter} begins in line {start}")
                end = self.text.find("\n", self.at)
                end = len(self.text) if end < 0 else end
                line = self.text[self.at : end]
                self.at = end + 1
                if (line.lstrip("\t") if tabs else line) == delimiter:
                    break
        self._documents.clear()
