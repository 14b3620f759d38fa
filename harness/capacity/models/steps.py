"""Time of a frame step against sessions: fitted to the rungs of ladders, with draws for its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from harness.capacity.models.between_ladders import ASSUMED, Between
from harness.capacity.models.service import weighted_r_squared
from harness.errors import InconclusiveError
from harness.records.fit import FittedStep

MIN_RUNGS = 3
WORST_RESIDUAL_OF_A_LINE = 0.10
MOST_NOISE = 0.25  # relative standard deviation of a rung; with more, nothing is fitted
_SAME_LOAD = 1.05  # rungs whose sessions differ by less than 5% are one knot
_LAST_KNOTS = 3  # that the slope beyond the last one rests on
_ALIGNMENTS = 50  # ladders with few rungs in common are aligned slowly


@dataclass(frozen=True)
class StepTime:
    """Seconds of a frame step at n sessions: ``kind`` "linear" is values[0] + values[1] n.

    ``kind`` "piecewise" is linear between knots (``values`` are the seconds at ``knots``), constant before the first,
    and after the last has the slope of its last three knots or of the whole, whichever is steeper.
    """

    kind: str
    values: tuple[float, ...]
    knots: tuple[float, ...] = ()

    @classmethod
    def of_record(cls, record: FittedStep) -> StepTime:
        return cls(record.kind, record.values, record.knots)

    def __call__(self, sessions: np.ndarray | float) -> np.ndarray:
        n = np.asarray(sessions, dtype=float)
        if self.kind == "linear":
            return self.values[0] + self.values[1] * n
        beyond = np.maximum(n - self.knots[-1], 0)
        return np.interp(n, self.knots, self.values) + beyond * self._last_slope()

    def frames_per_s(self, sessions: np.ndarray | float) -> np.ndarray:
        """Frames/s of a device, all sessions together; 0 without sessions."""
        n = np.asarray(sessions, dtype=float)
        return n / self(np.maximum(n, 1e-9))

    def _last_slope(self) -> float:
        x, y = np.array(self.knots), np.array(self.values)
        last_x, last_y = x[-_LAST_KNOTS:] - x[-_LAST_KNOTS:].mean(), y[-_LAST_KNOTS:]
        return max(float(last_x @ last_y / (last_x @ last_x)), float((y[-1] - y[0]) / (x[-1] - x[0])), 0.0)


@dataclass(frozen=True)
class Rungs:
    """The rungs behind a fit: three arrays [n]; ``trial`` is the number of each rung's trial."""

    sessions: np.ndarray
    step_s: np.ndarray
    trial: np.ndarray


@dataclass(frozen=True)
class StepFit:
    """A fitted step time. ``line``: (intercept, slope) of the best line, also where the fit is piecewise.

    ``noise``: relative standard deviation of a rung within its ladder. ``between``: how far whole ladders differ, and
    ``ladders``, how many determine the level. ``draws`` [d, values]: equally likely alternatives at this level, and
    ``levels`` [d], by which the level of each may differ.
    """

    step_time: StepTime
    line: tuple[float, float]
    r_squared: float
    noise: float
    degrees: int
    max_sessions: float
    draws: np.ndarray
    levels: np.ndarray
    between: Between
    ladders: int

    def alternatives(self) -> list[StepTime]:
        return [replace(self.step_time, values=tuple(draw)) for draw in self.draws * self.levels[:, None]]


def fit_step_time(
    rungs: Rungs,
    rng: np.random.Generator,
    draws: int = 200,
    *,
    prior: Between = ASSUMED,
    not_of_the_level: int | None = None,
) -> StepFit:
    """Least squares of relative errors, with both coefficients of the line at or above zero.

    Where the line is off by more than 10% at some rung, the rungs themselves are joined (kind "piecewise"). Each ladder
    has a factor of its own, of which ``prior`` says how far it may differ; the fit has the mean factor. The ladder of
    trial ``not_of_the_level`` counts for the shape but not for that mean: it was the highest of many.

    A draw refits values to which the noise of a rung was added, its variance drawn from a scaled inverse chi-square
    (which gives Student-t intervals). Its level is drawn for itself. Raises InconclusiveError below three rungs
    at different numbers of sessions, or where rungs scatter by more than 25%.
    """
    levels = count_levels(rungs.sessions)
    if levels < MIN_RUNGS:
        raise InconclusiveError(
            f"the step time needs {MIN_RUNGS} rungs at different numbers of sessions, not {levels}: "
            "measure a longer ladder"
        )
    aligned, factors = align(rungs, not_of_the_level)
    line = line_of(aligned.sessions, aligned.step_s)
    off = aligned.step_s / _on(line, aligned.sessions) - 1
    if np.max(np.abs(off)) <= WORST_RESIDUAL_OF_A_LINE:
        step_time = StepTime("linear", line)
        degrees = max(len(off) - 1 - len(factors), 1)
        noise = math.sqrt(float(off @ off) / degrees)
    else:
        knots, values = _merge(aligned)
        step_time = StepTime("piecewise", tuple(values.tolist()), tuple(knots.tolist()))
        noise, degrees = _noise_between(aligned, step_time, len(factors))
    _refuse_noise(aligned, len(factors))
    r_squared = weighted_r_squared(aligned.step_s, _on(line, aligned.sessions), np.ones(len(off)))
    between = prior.with_ladders(np.log(factors), comparable(rungs))
    ladders = max(len(factors) - (not_of_the_level in rungs.trial), 1)
    shapes = np.array([_draw(aligned, step_time, noise, degrees, rng) for _ in range(draws)])
    largest, drawn = float(rungs.sessions.max()), between.draw(ladders, rng, draws)
    return StepFit(step_time, line, r_squared, noise, degrees, largest, shapes, drawn, between, ladders)


def align(rungs: Rungs, not_of_the_level: int | None = None) -> tuple[Rungs, np.ndarray]:
    """The rungs with every ladder at the mean level, and the factor [trials] by which each was above it.

    Ladders may have different rungs: knots and factors are fitted in turn. The mean leaves out the trial
    ``not_of_the_level``, if there is another.
    """
    trials, of_trial = np.unique(rungs.trial, return_inverse=True)
    of_knot, logs = groups(rungs.sessions), np.log(rungs.step_s)
    factors, counts = np.zeros(len(trials)), np.bincount(of_trial)
    for _ in range(_ALIGNMENTS if len(trials) > 1 else 0):
        knots = np.bincount(of_knot, logs - factors[of_trial]) / np.bincount(of_knot)
        factors = np.bincount(of_trial, logs - knots[of_knot]) / counts
    level = trials != not_of_the_level
    factors -= np.mean(factors[level]) if level.any() else np.mean(factors)
    return replace(rungs, step_s=np.exp(logs - factors[of_trial])), np.exp(factors)


def comparable(rungs: Rungs) -> np.ndarray:
    """A number for each trial [trials]; trials with the same one share rungs, directly or through others."""
    trials, of_trial = np.unique(rungs.trial, return_inverse=True)
    of_knot = groups(rungs.sessions)
    size = len(trials) + int(of_knot.max()) + 1
    links = coo_array((np.ones(len(of_knot)), (of_trial, len(trials) + of_knot)), shape=(size, size))
    return connected_components(links, directed=False)[1][: len(trials)]


def band(fit: StepFit, step_s: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval of measured rungs' true step times, within their ladder: low and high, in seconds (Student's t)."""
    reach = np.exp(min(fit.noise * special.stdtrit(fit.degrees, (1 + confidence) / 2), math.log(10)))
    return step_s / reach, step_s * reach


def _refuse_noise(rungs: Rungs, ladders: int) -> None:
    """Raise InconclusiveError where repeats of a rung differ too much, or steps fall far as sessions grow."""
    knots = np.log(_merge(rungs)[1])
    falls = knots - optimize.isotonic_regression(knots).x
    repeated = _noise_of_repeats(rungs, ladders)
    scatter = max(repeated[0] if repeated else 0.0, math.sqrt(float(falls @ falls) / len(knots)))
    if scatter > MOST_NOISE:
        raise InconclusiveError(
            f"the rungs of its ladders scatter by {scatter:.0%} around any step time (limit {MOST_NOISE:.0%}): measure "
            "the ladder again, on a host that nothing else uses, with longer rungs"
        )


def line_of(sessions: np.ndarray, step_s: np.ndarray) -> tuple[float, float]:
    """Intercept and slope >= 0 that minimise the sum of squared relative errors."""
    rows = np.column_stack([1 / step_s, sessions / step_s])
    solution, _ = optimize.nnls(rows, np.ones(len(step_s)))
    return float(solution[0]), float(solution[1])


def _on(line: tuple[float, float], sessions: np.ndarray) -> np.ndarray:
    return line[0] + line[1] * sessions


def _merge(rungs: Rungs) -> tuple[np.ndarray, np.ndarray]:
    """Merge rungs with nearly equal numbers of sessions into one knot: their mean sessions and mean step time."""
    group = groups(rungs.sessions)
    count = np.bincount(group)
    return np.bincount(group, rungs.sessions) / count, np.bincount(group, rungs.step_s) / count


def count_levels(sessions: np.ndarray) -> int:
    """Number of different session counts; those within 5% of each other count as one."""
    return len(np.unique(groups(sessions)))


def groups(sessions: np.ndarray) -> np.ndarray:
    """Number of the knot of each rung, in order of sessions."""
    order = np.argsort(sessions, kind="stable")
    ordered = sessions[order]
    group = np.empty(len(sessions), dtype=int)
    group[order] = np.cumsum(np.diff(ordered, prepend=ordered[:1]) > np.maximum(ordered * (1 - 1 / _SAME_LOAD), 0))
    return group


def _noise_between(rungs: Rungs, step_time: StepTime, ladders: int) -> tuple[float, int]:
    """Noise of a rung from repeated rungs; without them, from each knot's distance to its neighbours' chord.

    The second treats curvature as noise, so it is too wide rather than too narrow.
    """
    if repeated := _noise_of_repeats(rungs, ladders):
        return repeated
    x, y = np.array(step_time.knots), np.array(step_time.values)
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    off = y[1:-1] / (y[:-2] + share * (y[2:] - y[:-2])) - 1
    return math.sqrt(float(off @ off) / len(off) / 1.5), len(off)


def _noise_of_repeats(rungs: Rungs, ladders: int) -> tuple[float, int] | None:
    """Noise and its degrees of freedom from rungs measured in several ladders; None with fewer than two degrees."""
    group = groups(rungs.sessions)
    degrees = len(group) - len(np.unique(group)) - (ladders - 1)
    if degrees < 2:
        return None
    off = rungs.step_s / _merge(rungs)[1][group] - 1
    return math.sqrt(float(off @ off) / degrees), degrees


def _draw(rungs: Rungs, step_time: StepTime, noise: float, degrees: int, rng: np.random.Generator) -> np.ndarray:
    deviation = noise * math.sqrt(degrees / max(rng.chisquare(degrees), 1e-3))
    if step_time.kind == "piecewise":
        return np.array(step_time.values) * _factors(deviation, len(step_time.values), rng)
    return np.array(line_of(rungs.sessions, step_time(rungs.sessions) * _factors(deviation, len(rungs.sessions), rng)))


def _factors(deviation: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` positive factors around 1; at most 4.5, to limit the effect of an extreme draw of a variance."""
    return np.exp(np.clip(deviation * rng.standard_normal(n), -1.5, 1.5))
