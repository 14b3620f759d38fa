"""Two planned deployments compared: step time, SLO metrics, rate and counts, each difference with an interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.capacity.fitting.rate_search import (
    Limits,
    drawn_rank,
    is_of_range,
    simulation_noise,
    steady_draws,
    steady_limit,
    steady_sessions,
)
from harness.capacity.models.between_ladders import ASSUMED_OF_RUNS, Between
from harness.capacity.models.device import Device, slo_name
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.count_difference import count_differences
from harness.records.comparison import (
    BETTER,
    NOT_SHOWN,
    RATE,
    SLO_METRIC,
    STEP,
    UNKNOWN,
    WORSE,
    Difference,
    finding_of,
)
from harness.records.fit import FittedDeployment, FittedStep
from harness.records.metrics import AUDIBLE_STALL_S
from harness.records.plan import Plan
from harness.records.slo import Slo

DRAWS = 1000
_SHOWN, _MEANT = 3, 12  # numbers of sessions at which step times are shown, and over which their mean goes
_STALL = "stall_longest_s"


@dataclass(frozen=True)
class Side:
    """The planned deployment of a run. ``between``: how far ladders differ, ``ladders`` of which determine its level.

    ``prior``: how far they were taken to differ before any was repeated. ``plan``: without it, counts are not compared.
    """

    fit: FittedDeployment
    device: Device
    limits: Limits
    between: Between
    ladders: int
    prior: Between
    plan: Plan | None = None

    @classmethod
    def of(cls, fit: FittedDeployment, limits: Limits, prior: Between, plan: Plan | None = None) -> Side:
        """``prior``: also for a fit of an older harness, which does not say how far ladders differ.

        Raises InconclusiveError for a deployment that was not fitted.
        """
        step = fit.step_time
        told = step.between if isinstance(step, FittedStep) else None
        between = Between(told.deviation, told.degrees or math.inf) if told else prior
        ladders = told.ladders if told else max(len(fit.trial_ids), 1)
        return cls(fit, Device.from_fit(fit), limits, between, ladders, prior, plan)

    def between_runs(self, pooled: Between | None = None) -> float:
        """How far runs differ, as the relative standard deviation of a factor that all ladders of a run share.

        One run's ladders are minutes apart on one host, and cannot show it: what they are taken to differ by before any
        was repeated, and no less than they do, since a host varies less within minutes than from day to day. It is
        known no better than ``ASSUMED_OF_RUNS``, with the degrees of which both runs' factors are drawn.
        """
        return max(self.prior.deviation, (pooled or self.between).deviation)


def differences(
    a: Side,
    b: Side,
    rng: np.random.Generator,
    confidence: float,
    pooled: Between | None = None,
    other_terms: str = "",
) -> tuple[Difference, ...]:
    """Every figure of both sides, and whether B is shown to be worse or better.

    Both sides' levels, rung noise and the sampling error of SLO quantiles are drawn together. The intervals of step
    times, SLO metrics and the rate hold together with ``confidence``, so that the chance of any false difference is at
    most 1 - confidence; those of counts are no narrower than that of steady arrivals. ``pooled``: how far ladders
    differ on hosts of one kind, by the ladders of both. ``other_terms``: in what the plans differ that a count depends
    on.
    """
    loads, at = _Loads.of(a, b), _reference(a, b)
    points = [_Figures.fitted(side, loads, at) for side in (a, b)]
    levels = drawn_levels(a, b, pooled, rng)
    drawn = [_Figures.drawn(side, loads, at, own, rng) for side, own in zip((a, b), levels, strict=True)]
    off = (drawn[1].logs() - points[1].logs()) - (drawn[0].logs() - points[0].logs())
    reach = joint_reach(off, confidence)
    steps = len(loads.shown) + 1
    rows = [*_step_rows(points, loads, reach), *_slo_rows(a, points, at, reach[steps:])]
    counts = count_differences(a.plan, b.plan, reach[-1], other_terms) if a.plan and b.plan else ()
    rate = _rate_row(a, b, reach[-1] + _beyond_steady(a, b, points))
    return (*rows, rate, *(_within_range(each, a, b) for each in counts))


def joint_reach(off: np.ndarray, confidence: float) -> np.ndarray:
    """How far intervals that hold together reach below and above an estimate [rows, 2], as logarithms.

    ``off`` [draws, rows]: drawn deviations. The largest of a draw, each relative to its own quantile on its side, has
    the quantile that widens all of them (max-t: Westfall and Young, Resampling-Based Multiple Testing, 1993). Infinite
    where a figure has no bound.
    """
    unknown, tail = np.isnan(off), (1 + confidence) / 2
    sides = [np.where(unknown, np.inf, sign * off) for sign in (-1, 1)]
    single = [np.maximum(np.quantile(side, tail, axis=0, method="higher"), 1e-12) for side in sides]
    with np.errstate(invalid="ignore"):
        relative = [np.where(np.isfinite(one), side / one, 0.0) for side, one in zip(sides, single, strict=True)]
    largest = np.quantile(np.max(relative, axis=(0, 2)), confidence, method="higher")
    return np.stack(single, axis=1) * max(float(largest), 1.0)


@dataclass(frozen=True)
class _Loads:
    """Numbers of sessions that both sides measured, from one to the most: ``shown``, and those of the mean."""

    shown: np.ndarray
    meant: np.ndarray

    @classmethod
    def of(cls, a: Side, b: Side) -> _Loads:
        most = max(round(min(a.device.max_sessions, b.device.max_sessions)), 1)
        return cls(*(np.unique(np.rint(np.geomspace(1, most, count))) for count in (_SHOWN, _MEANT)))

    def steps(self, step: StepTime) -> np.ndarray:
        """Seconds of a step: the geometric mean over the loads, then at those shown."""
        mean_s = np.exp(np.mean(np.log(step(self.meant))))
        return np.append(mean_s, step(self.shown))


@dataclass(frozen=True)
class _Figures:
    """Step times [.., 1 + loads], SLO metrics [.., SLOs] and the steady rate [..] of a side, as fitted or as drawn."""

    step_s: np.ndarray
    metrics: np.ndarray
    frames_per_s: np.ndarray

    @classmethod
    def fitted(cls, side: Side, loads: _Loads, at: float) -> _Figures:
        quantiles = [np.array(slo.quantile) for slo in side.limits.slos]
        steady = np.array(steady_limit(side.device, side.limits)[0])
        step_s = side.device.step_time
        return cls(loads.steps(step_s), _metrics(side, step_s(np.array([at])), quantiles)[0], steady)

    @classmethod
    def drawn(cls, side: Side, loads: _Loads, at: float, levels: Levels, rng: np.random.Generator) -> _Figures:
        """Alternatives, one for each of ``levels`` [draws]."""
        shapes, count = side.device.draws or (side.device.step_time.values,), len(levels.steps)
        chosen = tuple(shapes[place] for place in rng.integers(len(shapes), size=count))
        device = replace(side.device, draws=chosen, levels=tuple(levels.steps.tolist()))
        alternatives = [each.step_time for each in device.alternatives()]
        step_s = np.array([loads.steps(each) for each in alternatives])
        at_s = np.array([float(each(at)) for each in alternatives]) * (levels.requests / levels.steps)
        ranks = [np.array([drawn_rank(device, slo, rng) for _ in range(count)]) for slo in side.limits.slos]
        slower = replace(device, levels=tuple(levels.requests.tolist()))
        rates = steady_draws(slower, side.limits, rng) * simulation_noise(count, rng)
        return cls(step_s, _metrics(side, at_s, ranks), rates)

    def logs(self) -> np.ndarray:
        """All as logarithms [.., 1 + loads + SLOs + 1]; -inf for a rate of 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.concatenate([self.step_s, self.metrics, self.frames_per_s[..., None]], axis=-1))


def _metrics(side: Side, step_s: np.ndarray, probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """Each SLO's metric [draws, SLOs] at steps of ``step_s`` [draws]; stalls that nobody hears count as 50 ms."""
    columns = [np.empty((len(step_s), 0))]
    for slo, probability in zip(side.limits.slos, probabilities, strict=True):
        values = side.device.at_constant_step(slo.traffic_class, slo.metric, probability, step_s)
        columns.append(np.maximum(values, AUDIBLE_STALL_S if slo.metric == _STALL else 0.0)[:, None])
    return np.concatenate(columns, axis=1)


@dataclass(frozen=True)
class Levels:
    """Factors [draws] of the level of a side: of its step times, and of what its requests saw.

    The requests of all ladders are pooled, so the tail of an SLO's metric is that of the slowest ladder. Of L normal
    ladders the slowest differs from their mean, of which it is independent, with a variance of (1 - 1/L^2) / 4 of that
    of one ladder (to 4% for 2 to 10 of them).
    """

    steps: np.ndarray
    requests: np.ndarray

    @classmethod
    def of(cls, runs: np.ndarray, ladders: int, singles: np.ndarray) -> Levels:
        """``runs`` [draws]: factors of the run; ``singles`` [2, draws]: of a ladder, for the mean and the slowest."""
        steps = runs * singles[0] ** (1 / math.sqrt(ladders))
        return cls(steps, steps * singles[1] ** (math.sqrt(1 - ladders**-2) / 2))


def drawn_levels(a: Side, b: Side, pooled: Between | None, rng: np.random.Generator) -> list[Levels]:
    """Factors of both sides, each of its run and of its ladders.

    The deviation of runs, and the pooled one of ladders, of a draw is one for both sides. That of runs is not divided
    by the number of ladders: all of a run were measured on one host in one hour.
    """
    sides, made = (a, b), []
    runs = ASSUMED_OF_RUNS.draw(1, rng, DRAWS, of=2)
    shared = None if pooled is None else pooled.draw(1, rng, DRAWS, of=4)
    for number, side in enumerate(sides):
        singles = side.between.draw(1, rng, DRAWS, of=2) if shared is None else shared[2 * number : 2 * number + 2]
        own = runs[number] ** (side.between_runs(pooled) / ASSUMED_OF_RUNS.deviation)
        made.append(Levels.of(own, side.ladders, singles))
    return made


def _beyond_steady(a: Side, b: Side, points: Sequence[_Figures]) -> float:
    """By how much more the rate differs than that of steady arrivals, whose deviations are drawn, as logarithms.

    At random times fewer sessions leave less room, so a level changes the rate of a device by more.
    """
    rates, steady = (a.fit.rate(), b.fit.rate()), [float(each.frames_per_s) for each in points]
    if not (all(rates) and all(steady)):
        return 0.0
    changes = [abs(math.log(second / first)) for first, second in (rates, steady)]
    return max(changes[0] - changes[1], 0.0)


def _reference(a: Side, b: Side) -> float:
    """The load of SLO metrics: the most whole sessions with which A meets its SLOs, of those that both measured."""
    most = min(a.device.max_sessions, b.device.max_sessions, steady_sessions(a.device, a.limits))
    return float(max(math.floor(most), 1))


def _step_rows(points: Sequence[_Figures], loads: _Loads, reach: np.ndarray) -> Iterator[Difference]:
    for place, sessions in enumerate([None, *loads.shown.tolist()]):
        a, b = (float(each.step_s[place]) for each in points)
        yield _ratio(STEP, "step time", sessions, a, b, reach[place])


def _slo_rows(a: Side, points: Sequence[_Figures], at: float, reach: np.ndarray) -> Iterator[Difference]:
    for place, slo in enumerate(a.limits.slos):
        values = [float(each.metrics[place]) for each in points]
        yield _ratio(SLO_METRIC, _name(slo), at, *values, reach[place])


def _rate_row(a: Side, b: Side, reach: np.ndarray) -> Difference:
    name, rates = "requests/s of one device", [side.fit.max_rate_per_s for side in (a, b)]
    bare = Difference(kind=RATE, name=name, a=rates[0], b=rates[1], change=None, interval=(None, None), finding=UNKNOWN)
    if None in rates:
        why = [f"{label}: {side.fit.inconclusive}" for label, side in zip("AB", (a, b), strict=True)]
        return replace(bare, note="; ".join(each for each in why if not each.endswith(": ")))
    if not all(rates):
        return replace(bare, finding=_of_nothing(a, b), note="0: an SLO is violated at every rate")
    row = _ratio(RATE, name, None, a.fit.rate(), b.fit.rate(), reach, less_is_better=False)
    beyond = any(side.plan and side.plan.rate_per_device.basis == "extrapolated" for side in (a, b))
    return _within_range(replace(row, extrapolated=beyond), a, b)


def _of_nothing(a: Side, b: Side) -> str:
    """What a rate of 0 shows: it is certain, so the other one decides by its interval."""
    if not (a.fit.rate() or b.fit.rate()):
        return NOT_SHOWN
    low = (a if a.fit.rate() else b).fit.max_rate_interval[0]
    return NOT_SHOWN if not low else WORSE if a.fit.rate() else BETTER


def _within_range(row: Difference, a: Side, b: Side) -> Difference:
    """The row, with no finding that rests on a rate of which only a lower bound is known."""
    bounded = {WORSE: ("B", b), BETTER: ("A", a)}.get(row.finding)
    if bounded is None or not is_of_range(bounded[1].fit.binding):
        return row
    note = f"the ladder of {bounded[0]} ended before an SLO was violated: its rate is a lower bound"
    return replace(row, finding=NOT_SHOWN, note=note)


def _ratio(
    kind: str, name: str, at: float | None, a: float, b: float, reach: np.ndarray, *, less_is_better: bool = True
) -> Difference:
    """A relative change with its interval; ``reach`` [2]: how far that goes below and above it, as logarithms."""
    known: dict[str, Any] = {"kind": kind, "name": name, "at": at, "a": a, "b": b}
    if not all(math.isfinite(each) and each > 0 for each in (a, b)):
        known |= {side: value if math.isfinite(value) else None for side, value in (("a", a), ("b", b))}
        note = "not known in both runs"
        return Difference(**known, change=None, interval=(None, None), finding=UNKNOWN, note=note)
    bounds = math.log(b / a) + np.array([-1, 1]) * reach
    low, high = (math.expm1(float(bound)) if math.isfinite(bound) else None for bound in bounds)
    finding = finding_of((low, high), less_is_better=less_is_better)
    return Difference(**known, change=b / a - 1, interval=(low, high), finding=finding)


def _name(slo: Slo) -> str:
    return slo_name(slo.traffic_class, slo.metric, slo.quantile)
