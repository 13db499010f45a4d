"""Events in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpiddl.base.units import format_bytes
from mpiddl.observe.events import Event, Kind

__all__ = ["in_words", "quoted"]


def quoted(names: Sequence[str], most: int = 4) -> str:
    """``"'a', 'b' and 3 more"``."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def in_words(event: Event, about: Mapping[str, Any]) -> str:
    """What an event says.

    Args:
        event: Of any kind.
        about: The recorder's description, for the names; where it lacks some, numbers must do.
    """
    words = _WORDS[Kind(event.kind)]
    model = about.get("models", {}).get(str(event.model), {})
    return words.format(
        bucket=_bucket(event.subject, model),
        parameter=_parameter(event.subject, model),
        last=_parameter(event.value, model),
        nbytes=format_bytes(event.value),
        value=event.value,
        number=f" {event.value}" if event.value else "",
        subject=event.subject,
    ) + (f" (model {event.model})" if event.model > 1 else "")


_WORDS = {
    Kind.FORWARD_BEGIN: "began a forward",
    Kind.FORWARD_END: "ended a forward",
    Kind.BACKWARD_BEGIN: "began backward{number}",
    Kind.BACKWARD_END: "ended backward{number}",
    Kind.GRADIENT: "got the gradient of {parameter}",
    Kind.READY: "{bucket} became ready with {last}",
    Kind.IN_FLIGHT: "launched {bucket}, {nbytes}",
    Kind.COMPLETE: "{bucket} is complete",
    Kind.WAIT_BEGIN: "began to wait for {bucket}",
    Kind.WAIT_END: "waited long enough for {bucket}",
    Kind.CHUNK: "sent {nbytes} of tag {subject}",
    Kind.PLAN: "planned {subject} buckets, {nbytes}",
    Kind.STEP: "updated the parameters that were complete with {bucket}",
}


def _bucket(number: int, model: Mapping[str, Any]) -> str:
    if number < 0:
        return "all buckets"
    buckets, names = model.get("buckets", ()), model.get("names", ())
    if number >= len(buckets):
        return f"bucket {number}"
    members = [names[member] for member in buckets[number]["members"] if member < len(names)]
    return f"bucket {number} ({quoted(members, 2)})"


def _parameter(number: int, model: Mapping[str, Any]) -> str:
    names = model.get("names", ())
    return repr(names[number]) if 0 <= number < len(names) else f"parameter {number}"
