"""What lasts: events at its beginning and end, and a range for whoever profiles."""

from __future__ import annotations

from types import TracebackType

import torch

from mpiddl.observe.events import Kind, record, recorder

__all__ = ["span"]


class span:  # noqa: N801 - used like a function
    """``with span(Kind.WAIT_BEGIN, model, bucket):`` records that event and its end.

    Under torch.profiler (and ``emit_nvtx``, which makes NVTX ranges of these) it is a range too;
    while mpiddl traces on a machine with a GPU it is an NVTX range in any case.
    """

    __slots__ = ("_event", "_marks_gpu", "_range")

    def __init__(self, begin: Kind, model: int = 0, subject: int = -1, value: int = 0) -> None:
        self._event = (begin, model, subject, value)
        self._range: torch.profiler.record_function | None = None
        self._marks_gpu = False

    def __enter__(self) -> None:
        record(*self._event)
        if torch._C._autograd._profiler_enabled():
            self._range = torch.profiler.record_function(self._name())
            self._range.__enter__()  # type: ignore[no-untyped-call]
        elif recorder.tracing and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.nvtx.range_push(self._name())  # type: ignore[no-untyped-call]
            self._marks_gpu = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
        if self._marks_gpu:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        begin, model, subject, value = self._event
        record(begin + 1, model, subject, value)

    def _name(self) -> str:
        begin, _, subject, _ = self._event
        what = begin.name.removesuffix("_BEGIN").lower()
        return f"mpiddl.{what}" if subject < 0 else f"mpiddl.{what}(bucket {subject})"
