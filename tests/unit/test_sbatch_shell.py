"""How scripts are cut into commands, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiddl.sbatch.check import check_script
from mpiddl.sbatch.lexer import ShellError
from mpiddl.sbatch.shell import read_commands


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "#!/bin/bash"),
        ("#SBATCH -N 1\nsrun x\n", "first line"),
        ("#!/usr/bin/env python3\nprint()\n", "first line"),
        ("#!/bin/bash\necho 'a\n\n", "the ' in line 2 is not closed"),
        ('#!/bin/bash\n\necho "a\n', 'the " in line 3 is not closed'),
        ("#!/bin/bash\necho $(ls\n", "the ( in line 2 is not closed"),
        ("#!/bin/bash\na=(b\n", "')' is missing"),
        ("#!/bin/bash\ncat <<E\nE E\n", "ends at E"),
    ],
)
def test_what_is_no_shell_script_is_refused(text, words):
    with pytest.raises(ShellError) as caught:
        check_script(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a 'b c' \"d $e\" f\\ g $'h\\'i'", ["a", "b c", "d $e", "f g", "h\\'i"]),
        ("a \\\n  b", ["a", "b"]),
        ('a "$(basename "$0" " )")" `b "c d"`', ["a", '$(basename "$0" " )")', '`b "c d"`']),
        ("a ${#b[@]} $# c#d # e 'f", ["a", "${#b[@]}", "$#", "c#d"]),
        ("a >b 2>&1 <c 3 &>d", ["a", "3"]),
        ("a <(b | c) $((1 << 2))", ["a", "<(b | c)", "$((1 << 2))"]),
        ("A=1 B='c d' e=f", []),
        ("[[ a =~ ^(b|c)$ && d < e ]]", ["[[", "a", "=~", "^", "b", "c", "$", "d", "e", "]]"]),
        ("((a << 2))", ["((a << 2))"]),
        ("cat <<A <<-'B C'\nx ' (\nA\n\ty\n\tB C\n", ["cat"]),
    ],
)
def test_words_of_bash(text, words):
    commands, _ = read_commands(text)
    assert [command.words for command in commands] == [words]


@settings(max_examples=500, deadline=None)
@given(st.text("ab \n;&|(){}<>'\"`$\\#=[]!\tif", max_size=40))
def test_whatever_is_read_ends(text):
    with contextlib.suppress(ShellError):
        check_script("#!/bin/sh\n" + text)


def surroundings(text):
    """The commands' first words, with what is said of them."""
    commands, _ = read_commands(text)
    names = ("background", "piped", "checked", "repeated")
    return {
        "".join(command.words): {name for name in names if getattr(command, name)}
        | ({command.function} if command.function else set())
        for command in commands
    }


def test_what_surrounds_a_command():
    assert surroundings("a && b & c") == {"a": {"background"}, "b": {"background"}, "c": set()}
    assert surroundings("(a; b) & c") == {"a": {"background"}, "b": {"background"}, "c": set()}
    assert surroundings("{ a; b\n} | c") == {"a": {"piped"}, "b": {"piped"}, "c": set()}
    assert surroundings("if a; then b; elif c; then d; else e; fi") == {
        "a": {"checked"},
        "b": set(),
        "c": {"checked"},
        "d": set(),
        "e": set(),
    }
    assert surroundings("a || b; ! c") == {"a": {"checked"}, "b": set(), "c": set()}
    assert surroundings("for x in a b; do c; done; d") == {"c": {"repeated"}, "d": set()}
    assert surroundings("for x; do c; done &\nd") == {"c": {"repeated", "background"}, "d": set()}
    assert surroundings("while a; do b; done; c") == {
        "a": {"checked", "repeated"},
        "b": {"repeated"},
        "c": set(),
    }
    assert surroundings("case $x in a|b) c ;; (d) e & ;; esac; f")["f"] == set()
    assert surroundings("f() { a; }; b") == {"a": {"f"}, "b": set()}
    assert surroundings("function f { a; }; b") == {"a": {"f"}, "b": set()}
    assert surroundings("(f() ( a; ); b) & c") == {
        "a": {"f", "background"},
        "b": {"background"},
        "c": set(),
    }
