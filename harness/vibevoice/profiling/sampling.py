"""Times of repeated calls: as many as make their median precise, within a share of the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np

SPREAD = 0.02  # repeating stops at this half-width of the median's 95% interval, relative to the median
_FEWEST, _MOST = 5, 2000
_SHORTEST_S, _LONGEST_S = 0.2, 5.0  # of calls at one point, however precise or imprecise
_FLOOR = 0.25  # minimum for a stage, as a share of its part of the whole budget
_TOO_SLOW = 2.0  # in shares of a point: after a first call that takes longer, there is no second one


class Sampler:
    """Shares the seconds of a budget among points, stage by stage where ``stage`` is called.

    ``synchronise`` waits for the device, before and after every timed call. ``timed_share``: share of a point's seconds
    for timing, where it is also measured in another way. ``clock`` returns seconds.
    """

    def __init__(
        self,
        budget_s: float,
        points: int,
        synchronise: Callable[[], None],
        timed_share: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._budget_s, self._points, self._clock = budget_s, points, clock
        self._ends_s = self._stage_ends_s = clock() + budget_s
        self._unstaged = self.points_left = points
        self._synchronise, self._timed_share = synchronise, timed_share

    def stage(self, points: int) -> None:
        """Start a stage of this many points, with its proportional share of the seconds left.

        Call it after the stage's set-up, whose cost all later stages then share. A stage gets at least a quarter of its
        share of the whole budget, so that all together may exceed the budget by that quarter.
        """
        now = self._clock()
        share_s = (self._ends_s - now) * points / max(points, self._unstaged)
        self._stage_ends_s = now + max(share_s, _FLOOR * self._budget_s * points / max(points, self._points))
        self._unstaged -= points
        self.points_left = points

    def sample(
        self, calls: Iterable[Callable[[], object]], needed: bool = False, at_least_ms: float = 0.0
    ) -> np.ndarray | None:
        """Milliseconds of the calls except the first, which warms up.

        None where the seconds are used up, or a call takes far more than a point's share: if one is expected to
        (``at_least_ms``) none is made, and after a first one that did there is no second. A ``needed`` point is always
        measured, by one call if necessary.
        """
        fair_s = self._left_s() / max(1, self.points_left)
        self.points_left -= 1
        if not needed and (fair_s <= 0 or at_least_ms > 1e3 * _TOO_SLOW * fair_s):
            return None
        return self._timed(calls, self._timed_share * min(_LONGEST_S, fair_s), math.inf if needed else fair_s)

    def seconds_beside(self) -> float:
        """Seconds left for measuring the last timed point in another way; 0 or less where the time is used up."""
        return (1 - self._timed_share) * min(_LONGEST_S, self._left_s() / max(1, self.points_left + 1))

    def _left_s(self) -> float:
        return self._stage_ends_s - self._clock()

    def _timed(self, calls: Iterable[Callable[[], object]], share_s: float, fair_s: float) -> np.ndarray | None:
        taken: list[float] = []
        began_s = self._clock()
        for number, call in enumerate(calls):
            took_ms = self._time(call)
            if number:
                taken.append(took_ms)
            spent_s = self._clock() - began_s
            if not taken and spent_s > _TOO_SLOW * fair_s:
                return None
            if taken and (spent_s > share_s or (sum(taken) > 1e3 * _SHORTEST_S and is_sure(taken))):
                break
        return np.array(taken)

    def _time(self, call: Callable[[], object]) -> float:
        self._synchronise()
        began_s = self._clock()
        call()
        self._synchronise()
        return 1e3 * (self._clock() - began_s)


def is_sure(taken: list[float]) -> bool:
    """Whether the median is precise enough."""
    return len(taken) >= _MOST or (len(taken) >= _FEWEST and spread(np.array(taken)) <= SPREAD)


def spread(taken: np.ndarray) -> float:
    """Half the 95% interval of the median as a share of it: 1.57 x quartile range / sqrt(n), NaN for one sample.

    McGill, Tukey and Larsen, "Variations of box plots", The American Statistician 32 (1978).
    """
    if len(taken) < 2:
        return math.nan
    low, middle, high = np.percentile(taken, (25, 50, 75))
    return float(1.57 * (high - low) / math.sqrt(len(taken)) / middle) if middle else math.nan
