"""Time of a frame step against sessions: fitted to the rungs of ladders, with draws for its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from harness.capacity.models.service import weighted_r_squared
from harness.errors import InconclusiveError
from harness.records.fit import FittedStep

MIN_RUNGS = 3
WORST_RESIDUAL_OF_A_LINE = 0.10
_SAME_LOAD = 1.05  # rungs whose sessions differ by less than 5% are one knot


@dataclass(frozen=True)
class StepTime:
    """Seconds of a frame step at n sessions: ``kind`` "linear" is values[0] + values[1] n.

    ``kind`` "piecewise" is linear between knots (``values`` are the seconds at ``knots``), constant before the first,
    and after the last has the slope of its last part or of the whole, whichever is steeper.
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
        x, y = self.knots, self.values
        return max((y[-1] - y[-2]) / (x[-1] - x[-2]), (y[-1] - y[0]) / (x[-1] - x[0]), 0.0)


@dataclass(frozen=True)
class Rungs:
    """The rungs behind a fit: three arrays [n]; ``trial`` is the number of each rung's trial."""

    sessions: np.ndarray
    step_s: np.ndarray
    trial: np.ndarray


@dataclass(frozen=True)
class StepFit:
    """A fitted step time. ``line``: (intercept, slope) of the best line, also where the fit is piecewise.

    ``noise``: relative standard deviation of a rung. ``draws`` [d, values]: equally likely alternatives.
    """

    step_time: StepTime
    line: tuple[float, float]
    r_squared: float
    noise: float
    degrees: int
    max_sessions: float
    draws: np.ndarray

    def alternatives(self) -> list[StepTime]:
        return [replace(self.step_time, values=tuple(draw)) for draw in self.draws]


def fit_step_time(rungs: Rungs, rng: np.random.Generator, draws: int = 200) -> StepFit:
    """Least squares of relative errors, with both coefficients of the line at or above zero.

    Where the line is off by more than 10% at some rung, the rungs themselves are joined (kind "piecewise").
    A draw refits values to which the noise of a rung was added, its variance drawn from a scaled inverse chi-square
    (which gives Student-t intervals); with two trials or more, whole trials are resampled too. Raises
    InconclusiveError below three rungs at different numbers of sessions.
    """
    levels = count_levels(rungs.sessions)
    if levels < MIN_RUNGS:
        raise InconclusiveError(
            f"the step time needs {MIN_RUNGS} rungs at different numbers of sessions, not {levels}: "
            "measure a longer ladder"
        )
    line = _line(rungs.sessions, rungs.step_s)
    off = rungs.step_s / _on(line, rungs.sessions) - 1
    if np.max(np.abs(off)) <= WORST_RESIDUAL_OF_A_LINE:
        step_time = StepTime("linear", line)
        degrees = len(off) - 2
        noise = math.sqrt(float(off @ off) / degrees)
    else:
        knots, values = _merge(rungs)
        step_time = StepTime("piecewise", tuple(values.tolist()), tuple(knots.tolist()))
        noise, degrees = _noise_between(rungs, step_time)
    fitted = _on(line, rungs.sessions)
    r_squared = weighted_r_squared(rungs.step_s, fitted, np.ones(len(fitted)))
    drawn = np.array([_draw(rungs, step_time, noise, degrees, rng) for _ in range(draws)])
    return StepFit(step_time, line, r_squared, noise, degrees, float(rungs.sessions.max()), drawn)


def band(fit: StepFit, step_s: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the true step times of measured rungs: low and high, in seconds, by Student's t."""
    reach = np.exp(min(fit.noise * stats.t.ppf((1 + confidence) / 2, fit.degrees), math.log(10)))
    return step_s / reach, step_s * reach


def _line(sessions: np.ndarray, step_s: np.ndarray) -> tuple[float, float]:
    """Intercept and slope >= 0 that minimise the sum of squared relative errors."""
    rows = np.column_stack([1 / step_s, sessions / step_s])
    solution, _ = optimize.nnls(rows, np.ones(len(step_s)))
    return float(solution[0]), float(solution[1])


def _on(line: tuple[float, float], sessions: np.ndarray) -> np.ndarray:
    return line[0] + line[1] * sessions


def _merge(rungs: Rungs) -> tuple[np.ndarray, np.ndarray]:
    """Merge rungs with nearly equal numbers of sessions into one knot: their mean sessions and mean step time."""
    group = _groups(rungs.sessions)
    count = np.bincount(group)
    return np.bincount(group, rungs.sessions) / count, np.bincount(group, rungs.step_s) / count


def count_levels(sessions: np.ndarray) -> int:
    """Number of different session counts; those within 5% of each other count as one."""
    return len(np.unique(_groups(sessions)))


def _groups(sessions: np.ndarray) -> np.ndarray:
    """Number of the knot of each rung, in order of sessions."""
    order = np.argsort(sessions, kind="stable")
    ordered = sessions[order]
    group = np.empty(len(sessions), dtype=int)
    group[order] = np.cumsum(np.diff(ordered, prepend=ordered[:1]) > np.maximum(ordered * (1 - 1 / _SAME_LOAD), 0))
    return group


def _noise_between(rungs: Rungs, step_time: StepTime) -> tuple[float, int]:
    """Noise of a rung from repeated rungs; without them, from each knot's distance to its neighbours' chord.

    The second treats curvature as noise, so it is too wide rather than too narrow.
    """
    group = _groups(rungs.sessions)
    repeats = len(group) - len(np.unique(group))
    if repeats >= 2:
        off = rungs.step_s / np.array(step_time.values)[group] - 1
        return math.sqrt(float(off @ off) / repeats), repeats
    x, y = np.array(step_time.knots), np.array(step_time.values)
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    off = y[1:-1] / (y[:-2] + share * (y[2:] - y[:-2])) - 1
    return math.sqrt(float(off @ off) / len(off) / 1.5), len(off)


def _draw(rungs: Rungs, step_time: StepTime, noise: float, degrees: int, rng: np.random.Generator) -> tuple[float, ...]:
    deviation = noise * math.sqrt(degrees / max(rng.chisquare(degrees), 1e-3))
    if step_time.kind == "piecewise":
        return tuple(np.array(step_time.values) * _factors(deviation, len(step_time.values), rng))
    trials = np.unique(rungs.trial)
    if len(trials) == 1:
        sessions, centre = rungs.sessions, step_time(rungs.sessions)
    else:
        rows = np.concatenate([np.flatnonzero(rungs.trial == t) for t in rng.choice(trials, len(trials))])
        sessions, centre = rungs.sessions[rows], rungs.step_s[rows]
    return _line(sessions, centre * _factors(deviation, len(sessions), rng))


def _factors(deviation: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` positive factors around 1; at most 4.5, to limit the effect of an extreme draw of a variance."""
    return np.exp(np.clip(deviation * rng.standard_normal(n), -1.5, 1.5))
