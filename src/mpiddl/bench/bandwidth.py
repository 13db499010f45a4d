"""Time and bandwidth of collectives, candidates interleaved.

Definitions as in nccl-tests: algbw = bytes / time; busbw = algbw x a factor that makes it
comparable with the speed of the hardware, whatever the number of ranks; GB = 1e9 bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy

from mpiddl.api.all_reduce import all_reduce
from mpiddl.bench.candidates import Candidate, Case
from mpiddl.comm.world import World
from mpiddl.errors import PeerError, UnsupportedBufferError

__all__ = ["Plan", "Row", "busbw_factor", "measure"]

BYTES_PER_ROUND = 4 << 20
MOST_CALLS = 200
SEED = 0
_Seconds = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


@dataclass(frozen=True)
class Row:
    """One line of the table; ``seconds`` is the median over rounds of the slowest rank's time.

    ``staging`` is how a GPU's messages went; None where none were sent, and on the host.
    """

    collective: str
    algorithm: str
    placement: str
    nbytes: int
    dtype: str
    op: str
    ranks: int
    seconds: float
    seconds_p99: float
    algbw: float
    busbw: float
    wrong: int | None
    staging: str | None = None

    as_dict = asdict


class Plan(NamedTuple):
    """How often and how to measure.

    Attributes:
        repeats: Rounds that count.
        warmup: Rounds before those.
        check: Count wrong elements.
        fresh: Write the input before each call, outside of the time.
    """

    repeats: int
    warmup: int
    check: bool = True
    fresh: bool = False


def busbw_factor(collective: str, ranks: int) -> float:
    """busbw / algbw."""
    if collective == "broadcast":
        return 1.0
    return (2 if collective == "all-reduce" else 1) * (ranks - 1) / ranks


def measure(
    case: Case,
    candidates: Sequence[Candidate],
    world: World,
    plan: Plan,
) -> Iterator[Row | str]:
    """A row for every candidate; a sentence for each that cannot do it. Collective.

    Candidates take turns in random order, so that whatever else happens on the machine happens to
    all of them. The rows are the same on every rank.
    """
    able: dict[_Way, Candidate] = {}
    wrong: list[int | None] = []
    for candidate in candidates:
        try:
            way = _Way(candidate.name, candidate.placement, candidate.staging_of(case))
            if way not in able:  # without messages all stagings are the same
                wrong.append(candidate.prepare(case, plan.check))
                able[way] = candidate
        except (UnsupportedBufferError, PeerError) as error:
            yield f"{candidate.name} is left out: {error}"
    if not able:
        return
    seconds = _take_turns(list(able.values()), case, plan)
    all_reduce(seconds, op="max", world=world)
    counts = numpy.array([count or 0 for count in wrong], dtype=numpy.int64)
    all_reduce(counts, op="sum", world=world)
    for place, way in enumerate(able):
        median = float(numpy.median(seconds[place]))
        algbw = case.nbytes / median / 1e9
        yield Row(
            collective=case.collective,
            algorithm=way.algorithm,
            placement=way.placement,
            nbytes=case.nbytes,
            dtype=str(case.dtype).removeprefix("torch."),
            op=case.op,
            ranks=world.size,
            seconds=median,
            seconds_p99=float(numpy.quantile(seconds[place], 0.99)),
            algbw=algbw,
            busbw=algbw * busbw_factor(case.collective, world.size),
            wrong=None if wrong[place] is None else int(counts[place]),
            staging=way.staging,
        )


class _Way(NamedTuple):
    """What tells a row from the others of its case."""

    algorithm: str
    placement: str
    staging: str | None


def _take_turns(able: Sequence[Candidate], case: Case, plan: Plan) -> _Seconds:
    """This rank's seconds per call, for each candidate those of all rounds that count."""
    order = random.Random(SEED)  # noqa: S311 - the same on every rank, no secret
    calls = max(1, min(MOST_CALLS, BYTES_PER_ROUND // max(1, case.nbytes)))
    seconds = numpy.zeros((len(able), plan.warmup + plan.repeats))
    for turn in range(plan.warmup + plan.repeats):
        for place in order.sample(range(len(able)), len(able)):
            seconds[place, turn] = able[place].time(calls, plan.fresh)
    return numpy.ascontiguousarray(seconds[:, plan.warmup :])
