"""How much of the gradient exchange training steps feel, candidates interleaved.

Exposed time is what a step takes longer than the same step without exchange. Both are measured in
the same round, a moment apart, so that a machine that is slow for a while is slow for both.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import numpy.typing

from mpiddl.api.all_reduce import all_reduce
from mpiddl.bench.models import ModelSpec
from mpiddl.bench.overlap_candidates import Candidate
from mpiddl.bench.steps import Cost
from mpiddl.comm.world import World

__all__ = [
    "BASELINE",
    "TOLERANCE",
    "Plan",
    "Row",
    "deviations",
    "distances_of",
    "measure",
    "median_and_interval",
]

BASELINE, REFERENCE = "none", "after"
SEED = 0
CONFIDENCE = 0.9
RESAMPLES = 2000
TOLERANCE = 1e-3
"""Of what training changed. Sums in another order, step after step, differ by some 1e-6 of it."""

Array = numpy.typing.NDArray[numpy.float64]


@dataclass(frozen=True)
class Plan:
    """How often to measure.

    Attributes:
        repeats: Rounds; a candidate has one block of steps in each.
        warmup: Steps of each candidate before those, in one go.
        steps: Steps of a block that count; one more before them does not.
    """

    repeats: int
    warmup: int
    steps: int


@dataclass(frozen=True)
class Row:
    """One candidate on one model. Seconds are per step, medians over rounds.

    Attributes:
        seconds: Of the slowest rank.
        exposed: Median over rounds of the difference to no exchange; from ``exposed_low`` to
            ``exposed_high`` is a 90 % bootstrap interval.
        hidden: The part of what exchange after backward exposes that this one does not.
        cpu: Processor time of the process that trains, all threads, mean over ranks.
        system: The kernel's part of that.
        beside: The part of ``cpu`` that threads beside the training one took.
        deviation: How far the parameters are from the others', relative to what training
            changed; None where there is nothing to compare.
        agrees_with: The candidate that this is measured against.
        rounds: ``seconds`` of each round.
        device: Where the model is, cpu or cuda.
    """

    model: str
    candidate: str
    ranks: int
    seconds: float
    exposed: float
    exposed_low: float
    exposed_high: float
    hidden: float | None
    samples_per_second: float
    cpu: float
    system: float
    beside: float
    deviation: float | None
    agrees_with: str | None
    rounds: list[float]
    device: str = "cpu"

    as_dict = dataclasses.asdict


def measure(
    spec: ModelSpec, candidates: Sequence[Candidate], world: World, plan: Plan
) -> list[Row]:
    """A row for every candidate, the same on every rank. Collective.

    ``none`` and ``after`` must be among the candidates: all are compared with these.
    """
    costs = _costs(candidates, world, plan)
    slowest = costs[:, :, 0].copy()
    all_reduce(slowest, op="max", world=world)
    all_reduce(costs, op="mean", world=world)
    names = [candidate.name for candidate in candidates]
    baseline = slowest[names.index(BASELINE)]
    after = float(numpy.median(slowest[names.index(REFERENCE)] - baseline))
    agreement = _agreement(candidates, world)
    rows = []
    for name, times, spent in zip(names, slowest, costs, strict=True):
        seconds, cost = float(numpy.median(times)), Cost(*numpy.median(spent, axis=0).tolist())
        exposed, low, high = median_and_interval(times - baseline)
        deviation, agrees_with = agreement.get(name, (None, None))
        rows.append(
            Row(
                model=spec.name,
                candidate=name,
                ranks=world.size,
                seconds=seconds,
                exposed=exposed,
                exposed_low=low,
                exposed_high=high,
                hidden=None if _alone(name) or after <= 0 else 1 - exposed / after,
                samples_per_second=spec.batch * world.size / seconds,
                cpu=cost.cpu,
                system=cost.system,
                beside=cost.beside,
                deviation=deviation,
                agrees_with=agrees_with,
                rounds=times.tolist(),
                device=world.device.type,
            )
        )
    return rows


def _alone(name: str) -> bool:
    """Whether each rank trains for itself."""
    return name.partition("/")[0] == BASELINE


def _costs(candidates: Sequence[Candidate], world: World, plan: Plan) -> Array:
    """This rank's costs by candidate and round. Every round has an order of its own."""
    order = random.Random(SEED)  # noqa: S311 - the same on every rank, no secret
    costs = numpy.zeros((len(candidates), plan.repeats, len(Cost._fields)))
    for candidate in candidates:
        candidate.run(plan.warmup)
    for turn in range(plan.repeats):
        for place in order.sample(range(len(candidates)), len(candidates)):
            costs[place, turn] = candidates[place].run(plan.steps)
    return costs


def median_and_interval(values: Array) -> tuple[float, float, float]:
    """The median, and a bootstrap interval that holds it with 90 % confidence."""
    resample = numpy.random.default_rng(SEED)
    medians = numpy.median(resample.choice(values, (RESAMPLES, len(values))), axis=1)
    edge = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(medians, [edge, 1 - edge])
    return float(numpy.median(values)), float(low), float(high)


def _agreement(
    candidates: Sequence[Candidate], world: World
) -> dict[str, tuple[float | None, str | None]]:
    """How far each candidate is from the one that most others agree with. Collective.

    Without exchange every rank has parameters of its own, so that one is left out.
    """
    compared = [candidate for candidate in candidates if not _alone(candidate.name)]
    if len(compared) < 2:
        return {}
    distances = distances_of([candidate.changes() for candidate in compared])
    all_reduce(distances, op="max", world=world)
    medoid, far = deviations(distances)
    names = [candidate.name for candidate in compared]
    return {name: (away, names[medoid]) for name, away in zip(names, far, strict=True)}


def distances_of(changes: Sequence[Sequence[float]]) -> Array:
    """Between each two candidates' changes, relative to how far training went."""
    prints = numpy.array(changes)
    with numpy.errstate(all="ignore"):  # nothing moved, or not to numbers: nobody agrees
        far = numpy.linalg.norm(prints[:, None] - prints[None], axis=2)
        relative = far / numpy.median(numpy.linalg.norm(prints, axis=1))
    return numpy.where(numpy.isfinite(relative), relative, numpy.inf)


def deviations(distances: Array) -> tuple[int, list[float]]:
    """The candidate that most others are near to, and how far each is from it.

    Whoever is alone is far from it; and should most be wrong together, the rest is far from it, so
    no difference passes.
    """
    medoid = int(numpy.argmin(numpy.quantile(distances, 0.5, axis=1, method="lower")))
    return medoid, distances[medoid].tolist()
