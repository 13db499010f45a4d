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

from mpiddl.comm.world import World
from mpiddl.measure.models import ModelSpec
from mpiddl.measure.overlap_candidates import Candidate
from mpiddl.measure.steps import Cost
from mpiddl.overlap.calls import all_reduce

__all__ = ["BASELINE", "TOLERANCE", "Plan", "Row", "deviations", "measure", "median_and_interval"]

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
        repeats: Rounds that count; a candidate has one block of steps in each.
        warmup: Rounds before those.
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

    as_dict = dataclasses.asdict


def measure(
    spec: ModelSpec, candidates: Sequence[Candidate], world: World, plan: Plan
) -> list[Row]:
    """A row for every candidate, ``none`` among them; the same on every rank. Collective."""
    names = [candidate.name for candidate in candidates]
    costs = _costs(candidates, world, plan)
    slowest = costs[:, :, 0].copy()
    all_reduce(slowest, op="max", world=world)
    all_reduce(costs, op="mean", world=world)
    typical = numpy.median(costs, axis=1)
    compared = [candidate for candidate in candidates if candidate.name != BASELINE]
    distances = _distances([candidate.changes() for candidate in compared])
    all_reduce(distances, op="max", world=world)
    medoid, far = deviations(distances)
    far_of = dict(zip([candidate.name for candidate in compared], far, strict=True))
    baseline = slowest[names.index(BASELINE)]
    exposed = {
        name: median_and_interval(times - baseline)
        for name, times in zip(names, slowest, strict=True)
    }
    after = exposed[REFERENCE][0]
    rows = []
    for place, name in enumerate(names):
        seconds = float(numpy.median(slowest[place]))
        middle, low, high = exposed[name]
        cost = Cost(*map(float, typical[place]))
        comparable = name in far_of and len(compared) > 1
        rows.append(
            Row(
                model=spec.name,
                candidate=name,
                ranks=world.size,
                seconds=seconds,
                exposed=middle,
                exposed_low=low,
                exposed_high=high,
                hidden=None if name == BASELINE or after <= 0 else 1 - middle / after,
                samples_per_second=spec.batch * world.size / seconds,
                cpu=cost.cpu,
                system=cost.system,
                beside=cost.beside,
                deviation=far_of[name] if comparable else None,
                agrees_with=compared[medoid].name if comparable else None,
                rounds=slowest[place].tolist(),
            )
        )
    return rows


def _costs(candidates: Sequence[Candidate], world: World, plan: Plan) -> Array:
    """This rank's costs by candidate and round. Every round has an order of its own."""
    order = random.Random(SEED)  # noqa: S311 - the same on every rank, no secret
    costs = numpy.zeros((len(candidates), plan.repeats, len(Cost._fields)))
    for turn in range(-plan.warmup, plan.repeats):
        for place in order.sample(range(len(candidates)), len(candidates)):
            cost = candidates[place].run(plan.steps)
            if turn >= 0:
                costs[place, turn] = cost
    return costs


def median_and_interval(values: Array) -> tuple[float, float, float]:
    """The median, and a bootstrap interval that holds it with 90 % confidence."""
    resample = numpy.random.default_rng(SEED)
    medians = numpy.median(resample.choice(values, (RESAMPLES, len(values))), axis=1)
    edge = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(medians, [edge, 1 - edge])
    return float(numpy.median(values)), float(low), float(high)


def _distances(changes: Sequence[Sequence[float]]) -> Array:
    """Between each two candidates, relative to how far training went."""
    prints = numpy.array(changes)
    far = numpy.linalg.norm(prints[:, None] - prints[None], axis=2)
    moved = float(numpy.median(numpy.linalg.norm(prints, axis=1)))
    relative: Array = far / moved if moved else numpy.full_like(far, numpy.inf)
    return relative


def deviations(distances: Array) -> tuple[int, list[float]]:
    """The candidate that most others are near to, and how far each is from it.

    Whoever is alone is far from it; it takes a majority to be wrong unseen together, and then the
    rest is far from it, so no difference passes.
    """
    near = numpy.where(numpy.isfinite(distances), distances, numpy.inf)
    medoid = int(numpy.argmin(numpy.quantile(near, 0.5, axis=1, method="lower")))
    return medoid, near[medoid].tolist()
