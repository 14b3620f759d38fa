"""Rungs that were slower than the others of their ladders explain: the host was disturbed while they were held."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from harness.capacity.models.steps import MIN_RUNGS, Rungs, align, count_levels, groups, line_of

MOST_OVER_REPEATS = 1.15  # times the median of two or more others with as many sessions
MOST_OVER_NEXT = 1.25  # times the step with more sessions, which takes at least as long
MOST_OVER_LINE = 1.12  # times the line through all others, if they lie on one
_ON_A_LINE = 0.05
_MOST_SHARE = 0.25  # of the rungs; with more of them slow, no rung says what is usual


@dataclass(frozen=True)
class SlowRung:
    """``at``: its place in the rungs. ``times``: its step / what the others show."""

    at: int
    times: float


def slow_rungs(rungs: Rungs) -> list[SlowRung]:
    """Rungs to leave out of a fit, the slowest first.

    A rung counts as slow by repeats of it; without two, by the next rung above it or by the line through all others.
    Those with the fewest sessions are never slow: the first session may take longer for reasons of its own. A real rise
    at the last rung of a single ladder is taken for one, which ends what is known one rung earlier; a second ladder
    with the same rise shows that it is real.
    """
    found: list[SlowRung] = []
    left = np.arange(len(rungs.sessions))
    while len(found) < _MOST_SHARE * len(rungs.sessions):
        over = _over(_only(rungs, left))
        worst = int(np.argmax(over))
        remaining = np.delete(left, worst)
        if over[worst] <= 1 or count_levels(rungs.sessions[remaining]) < MIN_RUNGS:
            break
        found.append(SlowRung(int(left[worst]), float(_times(_only(rungs, left), worst)[0])))
        left = remaining
    return found


def without(rungs: Rungs, slow: list[SlowRung]) -> Rungs:
    """The rungs that are left."""
    return _only(rungs, np.setdiff1d(np.arange(len(rungs.sessions)), [each.at for each in slow]))


def _only(rungs: Rungs, rows: np.ndarray) -> Rungs:
    return replace(rungs, sessions=rungs.sessions[rows], step_s=rungs.step_s[rows], trial=rungs.trial[rows])


def _over(rungs: Rungs) -> np.ndarray:
    """How often each rung [n] takes the most that it may: above 1 it is slow."""
    return np.array([times / most for times, most in (_times(rungs, row) for row in range(len(rungs.sessions)))])


def _times(rungs: Rungs, row: int) -> tuple[float, float]:
    """The step of a rung / what the others show, and the limit of that; 0 where they show nothing."""
    knot = groups(rungs.sessions)
    if knot[row] == 0:
        return 0.0, 1.0
    knots = np.delete(knot, row)
    others, factors = align(_only(rungs, np.delete(np.arange(len(knot)), row)))
    own = np.flatnonzero(np.unique(others.trial) == rungs.trial[row])
    step_s = float(rungs.step_s[row] / (factors[own[0]] if len(own) else 1.0))
    alike, above = knots == knot[row], knots == knot[row] + 1
    if alike.sum() >= 2:
        return step_s / float(np.median(others.step_s[alike])), MOST_OVER_REPEATS
    by_next = step_s / float(np.median(others.step_s[above])) if above.any() else 0.0
    pairs = (by_next, MOST_OVER_NEXT), (step_s / _on_their_line(others, rungs.sessions[row]), MOST_OVER_LINE)
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _on_their_line(others: Rungs, sessions: float) -> float:
    """The step by the line through all others; infinite if they lie on none, or are too few to tell."""
    if count_levels(others.sessions) <= MIN_RUNGS:
        return np.inf
    intercept, slope = line_of(others.sessions, others.step_s)
    off = others.step_s / (intercept + slope * others.sessions) - 1
    return intercept + slope * sessions if np.max(np.abs(off)) <= _ON_A_LINE else np.inf
