"""Times of repeated calls: as many as make their median sure, within a share of the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np

SPREAD = 0.02  # half the 95% interval of a median, as a share of it, at which repeating ends
_FEWEST, _MOST = 5, 2000
_SHORTEST_S, _LONGEST_S = 0.2, 5.0  # of calls at one point, however sure or unsure they are


class Sampler:
    """Shares the seconds of a budget among a number of points.

    ``synchronise`` waits for the device, before and after every timed call. ``timed_share``: how much of its seconds a
    point is timed for, where it is measured in another way beside.
    """

    def __init__(self, budget_s: float, points: int, synchronise: Callable[[], None], timed_share: float = 1.0):
        self.deadline_s = time.monotonic() + budget_s
        self.points_left = points
        self._synchronise, self._timed_share = synchronise, timed_share

    def sample(self, calls: Iterable[Callable[[], object]], needed: bool = False) -> np.ndarray | None:
        """Milliseconds of the calls but the first, which warms up; None where the budget is used up.

        A point that is ``needed`` is measured all the same, by one call.
        """
        left_s = self.deadline_s - time.monotonic()
        share_s = self._timed_share * min(_LONGEST_S, left_s / max(1, self.points_left))
        self.points_left -= 1
        return None if left_s <= 0 and not needed else self._timed(calls, share_s)

    def seconds_beside(self) -> float:
        """What the point that was timed last may still take in another way; 0 or less where the budget is used up."""
        left_s = self.deadline_s - time.monotonic()
        return (1 - self._timed_share) * min(_LONGEST_S, left_s / (self.points_left + 1))

    def _timed(self, calls: Iterable[Callable[[], object]], share_s: float) -> np.ndarray:
        taken: list[float] = []
        began_s = time.monotonic()
        for number, call in enumerate(calls):
            took_ms = self._time(call)
            if number:
                taken.append(took_ms)
            spent_s = time.monotonic() - began_s
            if taken and (spent_s > share_s or (sum(taken) > 1e3 * _SHORTEST_S and is_sure(taken))):
                break
        return np.array(taken)

    def _time(self, call: Callable[[], object]) -> float:
        self._synchronise()
        began = time.perf_counter()
        call()
        self._synchronise()
        return 1e3 * (time.perf_counter() - began)


def is_sure(taken: list[float]) -> bool:
    """Whether more calls would tell nothing new."""
    return len(taken) >= _MOST or (len(taken) >= _FEWEST and spread(np.array(taken)) <= SPREAD)


def spread(taken: np.ndarray) -> float:
    """Half the 95% interval of the median as a share of it: 1.57 x quartile range / sqrt(n), NaN for one sample.

    McGill, Tukey and Larsen, "Variations of box plots", The American Statistician 32 (1978).
    """
    if len(taken) < 2:
        return math.nan
    low, middle, high = np.percentile(taken, (25, 50, 75))
    return float(1.57 * (high - low) / math.sqrt(len(taken)) / middle) if middle else math.nan
