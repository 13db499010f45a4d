"""Traps of signals, requeueing and exit status in sbatch scripts. Each says what to write instead.

Sources: the manual page of sbatch (``--signal``, ``--requeue``, ``--open-mode``), that of bash
(``trap``, ``wait``); what the launchers do with a signal was tried.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mpiddl.sbatch.script import Finding, Launch, Script
from mpiddl.sbatch.shell import Command

__all__ = ["SIGNAL_FINDERS"]

_NOT_OF_SLURM = {"EXIT", "ERR", "DEBUG", "RETURN", "INT", "HUP", "PIPE"}
_HYDRA = re.compile(r"-genv|-ppn|-envall|-hosts|-launcher")
_OPEN_MPI = re.compile(r"--?mca|--map-by|--bind-to|--report-bindings|--oversubscribe|--prtemca")


class _Trap(NamedTuple):
    """What the shell does at a signal: ``text`` is the handler, with the functions it calls."""

    line: int
    names: set[str]
    text: str


def _requeue(script: Script) -> Iterator[Finding]:
    requeue = script.asked("requeue")
    by_hand = [each.line for each in script.commands if "scontrol requeue" in " ".join(each.words)]
    lines = [requeue.line] if requeue else by_hand
    if not lines:
        return
    if script.value("open-mode") not in ("a", "append"):
        what = "a job that is requeued overwrites the output of its first run"
        yield Finding(lines[0], what, "write #SBATCH --open-mode=append")
    if requeue and not script.asked("signal"):
        what = "--requeue without --signal: nothing tells the job to save its state before it ends"
        yield Finding(requeue.line, what, "write #SBATCH --signal=B:USR1@60, and trap USR1")
    if by_hand and not requeue:
        what = "scontrol requeue is refused where the site's default is not to requeue jobs"
        yield Finding(by_hand[0], what, "write #SBATCH --requeue")


def _signal_to_whom(script: Script) -> Iterator[Finding]:
    asked = script.asked("signal")
    if asked is None:
        return
    to_shell, name = _asked_signal(asked.value)
    trapped = set().union(*(trap.names for trap in _traps(script)))
    if not to_shell and name in trapped:
        what = f"--signal={asked.value} goes to the steps only: the shell's trap never runs"
        yield Finding(asked.line, what, f"write #SBATCH --signal=B:{asked.value}")
    replaced = any(launch.replaces_shell for launch in script.launches)
    ignored = any(name in _names(each.words[2:]) for each in script.calls("trap"))
    if to_shell and name not in trapped and not replaced and not ignored:
        what = f"--signal={asked.value} goes to the shell only, which has no trap and dies of it"
        fix = f"write trap 'kill -{name} \"$step\"' {name}, and the launch in the background"
        yield Finding(asked.line, what, fix)


def _foreground(script: Script) -> Iterator[Finding]:
    for trap in _traps(script)[:1]:
        for launch in script.launches:
            calls = script.calls(launch.command.function) if launch.command.function else []
            is_later = max(each.line for each in [launch.command, *calls]) > trap.line
            if is_later and not _is_in_background(script, launch.command):
                yield Finding(
                    launch.command.line,
                    f"bash runs the trap of {min(trap.names)} only after {launch.launcher} "
                    "has ended",
                    'end it with &, then: step=$!; wait "$step"',
                )


def _waits(script: Script) -> Iterator[Finding]:
    behind = [each for each in script.launches if _is_in_background(script, each.command)]
    if not behind:
        return
    waits, traps = script.calls("wait"), _traps(script)
    first = behind[0].command.line
    if not waits:
        what = "runs in the background, and the script ends without waiting for it"
        yield Finding(first, what, 'write step=$!; wait "$step"')
        return
    if traps and not _waits_again(script, waits):
        what = "wait returns as soon as a trap has run, while the ranks still save their state"
        yield Finding(waits[0].line, what, "wait once more after a signal, in a loop")
    if traps and _stops(script) and not any("+e" in each.words for each in script.calls("set")):
        for wait in waits:
            if not wait.checked and wait.function is None:
                what = "a signal makes wait fail, and `set -e` then ends the script"
                yield Finding(wait.line, what, 'write status=0; wait "$step" || status=$?')
                break
    if all(len(wait.words) == 1 for wait in waits) and len(script.launches) == 1:
        what = "wait without a process is always successful: a job that failed counts as completed"
        yield Finding(waits[0].line, what, 'write step=$!, and wait "$step"')


def _first_to_leave(script: Script) -> Iterator[Finding]:
    """Where ranks save their state and leave, each in its own time."""
    if "scontrol requeue" not in script.text or not _traps(script):
        return
    for launch in script.launches:
        kills = launch.options.get("kill-on-bad-exit", "0") != "0"
        if launch.is_srun and kills and launch.options.get("mpi") != "pmi2":  # which needs it
            what = "--kill-on-bad-exit: the first rank that has saved its state ends the others"
            yield Finding(launch.command.line, what, "write --kill-on-bad-exit=0")


def _wrong_signal(script: Script) -> Iterator[Finding]:
    asked = script.asked("signal")
    sent = {_asked_signal(asked.value)[1]: asked.line} if asked else {}
    for trap in _traps(script):
        for name in trap.names & ({"USR2"} | ({"TERM"} if "requeue" in script.text else set())):
            sent.setdefault(name, trap.line)
    for launch in script.launches:
        if "USR2" in sent and _is_hydra(script, launch):
            what = f"MPICH's {launch.launcher} does not pass USR2 on: it ends the job"
            yield Finding(sent["USR2"], what, "write USR1")
        if "TERM" in sent and not launch.is_srun and not _is_hydra(script, launch):
            what = f"Open MPI's {launch.launcher} does not pass TERM on: it ends the ranks"
            yield Finding(sent["TERM"], what, "write USR1")


def _lost_status(script: Script) -> Iterator[Finding]:
    """Where a job that failed would count as completed."""
    stops, pipes = _stops(script), "pipefail" in script.text or "PIPESTATUS" in script.text
    for launch in script.launches:
        command = launch.command
        if command.piped and not pipes:
            what = f"the status is that of what stands behind the |, not {launch.launcher}'s"
            yield Finding(command.line, what, "write set -o pipefail")
        if stops or command.checked or command.repeated or command.function:
            continue
        ends = command
        if command.background:
            waits = [each for each in script.calls("wait") if len(each.words) > 1]
            if not waits:
                continue
            ends = waits[-1]
        if _is_ignored(script, ends):
            what = f"a failure is forgotten: commands follow, and there is no `set -e`: {_LAST}"
            yield Finding(ends.line, what, "write set -e near the top, or keep the status: $?")


_LAST = "the last one's status counts"


def _is_ignored(script: Script, command: Command) -> bool:
    """Whether commands follow this one, and none asks for its status."""
    place = next(at for at, each in enumerate(script.commands) if each is command)
    later = script.commands[place + 1 :]
    if command.piped:
        later = later[1:]
    later = [each for each in later if each.words or each.assigned]
    asks = any(
        "$?" in str([*each.words, *each.assigned.values()]) or "PIPESTATUS" in str(each)
        for each in later
    )
    return bool(later) and not asks and not command.checked and not command.repeated


def _asked_signal(value: str) -> tuple[bool, str]:
    """``"B:USR1@60"`` -> True, ``"USR1"``."""
    flags, _, name = value.partition("@")[0].rpartition(":")
    return "B" in flags.upper(), _name(name)


def _name(text: str) -> str:
    """``"SIGUSR1"`` and ``"10"`` -> ``"USR1"``."""
    if text.isdigit() and int(text) in set(signal.Signals):
        text = signal.Signals(int(text)).name
    return text.upper().removeprefix("SIG")


def _names(words: Sequence[str]) -> set[str]:
    return {_name(word) for word in words}


def _traps(script: Script) -> list[_Trap]:
    """Of signals that announce the end; ``trap - USR1`` and ``trap '' USR1`` run nothing.

    TERM comes at the end itself, where a trap may clean up, unless the script wants it earlier.
    """
    found = []
    is_late = "requeue" not in script.text and _asked_signal(script.value("signal"))[1] != "TERM"
    ignored = {*_NOT_OF_SLURM, "0", *(["TERM"] if is_late else [])}
    for command in script.calls("trap"):
        words = [word for word in command.words[1:] if word != "--"]
        names = _names(words[1:]) - ignored
        if names and words[0] not in ("", "-", "-p", "-l"):
            called = [
                " ".join([*each.words, *each.assigned])
                for each in script.commands
                if each.function and re.search(rf"\b{re.escape(each.function)}\b", words[0])
            ]
            found.append(_Trap(command.line, names, "\n".join([words[0], *called])))
    return found


def _is_in_background(script: Script, command: Command) -> bool:
    """Itself, or every call of the function that it stands in."""
    calls = script.calls(command.function) if command.function else []
    return command.background or (bool(calls) and all(each.background for each in calls))


def _waits_again(script: Script, waits: list[Command]) -> bool:
    """By a second wait, in a loop, in the trap, or in a function that is called twice."""
    calls = script.calls(waits[0].function) if waits[0].function else []
    return (
        len(waits) > 1
        or len(calls) > 1
        or any(each.repeated for each in [*waits, *calls])
        or any(re.search(r"\bwait\b", trap.text) for trap in _traps(script))
    )


def _stops(script: Script) -> bool:
    """Whether a failure ends the script: `set -e`, alone or among others, or in the first line."""
    options = [word for each in script.calls("set") for word in each.words[1:]]
    options += script.shebang.split()[1:]
    return "errexit" in options or any(re.fullmatch(r"-[a-zA-Z]*e[a-zA-Z]*", at) for at in options)


def _is_hydra(script: Script, launch: Launch) -> bool:
    """MPICH's launcher, or Intel's; Open MPI has an mpiexec too."""
    if launch.is_srun or _OPEN_MPI.search(" ".join(launch.words)):
        return False
    loads = [" ".join(each.words) for each in script.commands if each.words[:1] == ["module"]]
    hints = " ".join([*launch.words, *loads]).lower()
    if re.search(r"open-?mpi", hints):
        return False
    named = launch.launcher.startswith("mpiexec")
    return named or bool(_HYDRA.search(hints) or re.search(r"mpich|intel|impi", hints))


SIGNAL_FINDERS: tuple[Callable[[Script], Iterator[Finding]], ...] = (
    _requeue,
    _signal_to_whom,
    _foreground,
    _waits,
    _first_to_leave,
    _wrong_signal,
    _lost_status,
)
