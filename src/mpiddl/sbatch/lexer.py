"""Cuts a bash script into words, operators and comments, with their lines.

Nothing is expanded: ``$NAME`` and ``$(...)`` stay as they are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Comment", "Lexer", "ShellError", "Token"]

_OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|<<<|<<-|<<|>>|<&|>&|&>>|&>|<>|>\||[;&|()<>\n]")


class ShellError(ValueError):
    """What is read is not bash."""


class Comment(NamedTuple):
    """A line that is a comment: from its ``#`` on.

    Attributes:
        indented: Blanks stand in front.
        late: Something else than comments stands above.
    """

    line: int
    text: str
    indented: bool
    late: bool


class Token(NamedTuple):
    """A word without its quotes, or an operator; for ``NAME=(...)`` the array's words too."""

    line: int
    text: str
    is_word: bool
    array: list[str] | None = None


class Lexer:
    """Of one script. ``comments`` is complete when ``tokens`` has ended."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.comments: list[Comment] = []
        self._started = False
        self._documents: list[tuple[str, bool]] = []

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def tokens(self, until: str = "") -> Iterator[Token]:
        """Words and operators, up to the operator ``until``."""
        while self.at < len(self.text):
            if blank := re.compile(r"[ \t\r]+|\\\n").match(self.text, self.at):
                self.at = blank.end()
            elif self.text[self.at] == "#":
                self._comment()
            elif self.text.startswith(("<(", ">("), self.at):
                yield Token(self.line, self._word(), True)
            elif arithmetic := self._arithmetic():
                yield Token(self.line, arithmetic, True)
            elif operator := _OPERATOR.match(self.text, self.at):
                line, self.at = self.line, operator.end()
                if operator.group() == until:
                    return
                if operator.group() in ("<<", "<<-"):
                    self._expect_document(operator.group() == "<<-")
                elif operator.group() == "\n":
                    self._skip_documents()
                else:
                    self._started = True
                yield Token(line, operator.group(), False)
            else:
                self._started = True
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
            self.comments.append(Comment(self.line, text, bool(before), self._started))
        self.at = end

    def _arithmetic(self) -> str:
        """``((...))``, in which ``<<`` means something else; empty if it is not here."""
        begin = self.at
        if self.text.startswith("((", begin):
            text = self._brackets("(", ")")
            if text.endswith("))"):
                self._started = True
                return text
            self.at = begin
        return ""

    def _word_or_array(self) -> Iterator[Token]:
        line, word = self.line, self._word()
        if self.text.startswith("(", self.at) and re.fullmatch(r"[A-Za-z_]\w*\+?=", word):
            self.at += 1
            words = [token.text for token in self.tokens(until=")") if token.is_word]
            yield Token(line, word, True, words)
        elif not (word.isdigit() and self.text.startswith(("<", ">"), self.at)):  # 2> is no word
            yield Token(line, word, True)

    def _word(self) -> str:
        """Up to a blank or an operator, without quotes."""
        parts: list[str] = []
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
        begin = self.line
        parts: list[str] = []
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
