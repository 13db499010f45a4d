"""sbatch scripts as ``mpiddl slurm`` writes them; bash itself says what their words are."""

from __future__ import annotations

import itertools
import os
import re
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpiddl.sbatch.check import check_script
from mpiddl.sbatch.shell import read_commands
from mpiddl.sbatch.writing import MPIS, Batch, check_name, check_time, quote, write_script

PROGRAM = ("python", "jobs/digits.py", "--epochs", "5")
# All that an argument can hold: bytes but NUL, which Python keeps as surrogates where no UTF-8.
ARGUMENTS = st.lists(st.binary().map(lambda raw: os.fsdecode(raw.replace(b"\0", b""))), max_size=4)
SHOW = 'printf "%s\\0" "$@"'
# Standing in for the launchers: each says what it is told to start.
LAUNCHERS = f"srun() {{ {SHOW}; }}\nmpirun() {{ {SHOW}; }}\n"


def bash(script, **environment):
    """The words that the script hands to its launcher."""
    result = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"], "SLURM_CPUS_PER_TASK": "3", "SLURM_NTASKS": "8"}
        | environment,
    )
    assert result.stderr == b""
    return [os.fsdecode(word) for word in result.stdout.split(b"\0")[:-1]]


def directives(script):
    lines = re.findall(r"^#SBATCH (\S+)", script, re.MULTILINE)
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


@settings(deadline=None)  # each starts a bash
@given(ARGUMENTS)
@example(
    ["$HOME", "a b", "it's", 'a"b', ";rm", "a\nb", "\\", "", "-x", "*", "~", "!", "#", "{a,b}"]
)
@example(["a\r\nb'c\\\t\x7f", "\udc80f", "é\u2028", "\x01f", "$'\\n'"])
def test_arguments_arrive_unchanged(arguments):
    words = " ".join(map(quote, arguments))
    assert bash(f"set -- {words}\n{SHOW}" if arguments else ":") == arguments
    assert not re.search(r"[\x00-\x1f\x7f]", words)
    words.encode()
    # And our own reader of bash cuts the line as bash does, where it need not decode $'...'.
    if "$'" not in words and arguments:
        assert read_commands(f"x {words}")[0][0].words == ["x", *arguments]


@settings(deadline=None)  # each starts a bash
@given(ARGUMENTS.filter(lambda arguments: "--resume" not in arguments), st.sampled_from(MPIS))
def test_a_launcher_is_told_what_the_user_wrote(arguments, mpi):
    program = ["python", *arguments]
    told = bash(LAUNCHERS + write_script(Batch(tuple(program), mpi=mpi)))
    assert told[-len(program) :] == program
    if mpi == "mpirun":
        assert told[: -len(program)] == ["-n", "8", "--bind-to", "none"]
    else:
        options = [f"--mpi={mpi}", "--cpus-per-task=3", "--kill-on-bad-exit=1"]
        assert told[: -len(program)] == options


OPTIONS = {
    "nodes": (1, 2),
    "ranks_per_node": (None, 3),
    "gpus_per_node": (None, 4),
    "cpus_per_rank": (1, 2),
    "requeue": (False, True),
    "mpi": MPIS,
    "partition": (None, "gpu,long"),
    "account": (None, "me"),
    "name": (None, "run.1"),
}


def every_script():
    for values in itertools.product(*OPTIONS.values()):
        batch = Batch(PROGRAM, **dict(zip(OPTIONS, values, strict=True)))
        yield batch, write_script(batch)


def test_no_script_that_we_write_has_a_trap():
    number = 0
    for batch, script in every_script():
        assert check_script(script) == [], batch
        number += 1
    assert number == 2**8 * 3


def test_a_script_asks_for_what_is_wanted():
    for batch, script in every_script():
        asked = directives(script)
        assert asked["nodes"] == str(batch.nodes)
        ranks = batch.ranks_per_node or batch.gpus_per_node or 1
        assert asked["ntasks-per-node"] == str(ranks)
        assert asked["cpus-per-task"] == str(batch.cpus_per_rank)
        assert asked["time"] == "1:00:00"
        assert asked.get("gpus-per-node") == (batch.gpus_per_node and str(batch.gpus_per_node))
        assert ("--gpu-bind=none" in script) == (batch.gpus_per_node is not None)
        assert asked["job-name"] == (batch.name or "digits")
        assert (asked.get("partition"), asked.get("account")) == (batch.partition, batch.account)
        assert ("requeue" in asked, asked.get("open-mode"), asked.get("signal")) == (
            (True, "append", "B:USR1@60") if batch.requeue else (False, None, None)
        )
        assert "gpus-per-task" not in asked
        assert max(map(len, script.splitlines())) <= 100
        assert "#SBATCH" not in script.partition("set -euo pipefail")[2]


def test_bash_reads_all_scripts(tmp_path):
    scripts = [script for batch, script in every_script() if batch.nodes == 1 and not batch.account]
    for number, script in enumerate(scripts):
        (tmp_path / f"{number}.sbatch").write_text(script)
    check = 'for file in "$0"/*.sbatch; do bash -n "$file" || exit; done'
    result = subprocess.run(["bash", "-c", check, tmp_path], capture_output=True, check=True)
    assert (result.stdout, result.stderr) == (b"", b"")


@pytest.mark.parametrize(
    "text", ["90", "1:30", "1:30:00", "2-0", "2-12:30", "2-12:30:15", "00:05:00"]
)
def test_times_that_slurm_takes(text):
    assert check_time(text) == text
    assert directives(write_script(Batch(PROGRAM, time=text)))["time"] == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0:00",
        "0-0:0:0",
        "1h",
        "-1",
        "1:2:3:4",
        "1-",
        "-5:00",
        "1-2:3:4:5",
        " 5",
        "5\n",
        "1.5",
    ],
)
def test_times_that_slurm_does_not_take(text):
    with pytest.raises(ValueError, match="is no time"):
        check_time(text)
    with pytest.raises(ValueError, match="is no time"):
        write_script(Batch(PROGRAM, time=text))


@pytest.mark.parametrize(
    "text", ["", "a b", "a\n", "a\n#SBATCH --x", "a#b", "-a", "$USER", "a'", "é"]
)
@pytest.mark.parametrize("option", ["name", "partition", "account"])
def test_names_that_would_end_a_directive_or_begin_one(text, option):
    with pytest.raises(ValueError, match="is no name"):
        check_name(text)
    if text or option != "name":
        with pytest.raises(ValueError, match="is no name"):
            write_script(Batch(PROGRAM, **{option: text}))


@pytest.mark.parametrize("option", ["nodes", "ranks_per_node", "gpus_per_node", "cpus_per_rank"])
@pytest.mark.parametrize("number", [-1, 0])
def test_counts_are_counts(option, number):
    with pytest.raises(ValueError, match="is no count"):
        write_script(Batch(PROGRAM, **{option: number}))


def test_an_mpi_that_is_none():
    with pytest.raises(ValueError, match="none of pmix, pmi2, mpirun"):
        write_script(Batch(PROGRAM, mpi="pmix "))


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (("python", "jobs/digits.py", "x.py"), "digits"),
        (("./train me",), "train-me"),
        (("python", "a b\n#.py"), "a-b"),
        (("python", "/.py"), "py"),
        (("python", "é.py"), "mpiddl"),
    ],
)
def test_a_job_is_named_after_its_program(program, name):
    assert directives(write_script(Batch(program)))["job-name"] == name


def test_a_program_that_resumes_by_itself_is_told_once():
    batch = Batch((*PROGRAM, "--resume"), requeue=True)
    assert write_script(batch).count(" --resume") == 1
