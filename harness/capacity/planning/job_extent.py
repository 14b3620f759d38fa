"""How much of a fleet is simulated, over how many days, so that each percentile rests on enough streams or tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.capacity.simulator.traffic import DAY_S
from harness.errors import InconclusiveError

LEAST_BEYOND = 20  # streams or tasks beyond a quantile, on average; their number then varies by 22%
MOST_DAYS = 400


@dataclass(frozen=True)
class Judged:
    """What ``slo``, a quantile, is judged by: ``per_day`` streams or tasks (``kind``) of the whole fleet."""

    slo: str
    kind: str
    per_day: float
    quantile: float

    @property
    def needs(self) -> int:
        """How many it needs: LEAST_BEYOND / (1 - quantile), and three standard deviations for chance to take away."""
        least = LEAST_BEYOND / (1 - self.quantile)
        return math.ceil(least + 3 * math.sqrt(least))


@dataclass(frozen=True)
class Extent:
    """The ``part`` of a fleet, with its part of the load, that is simulated over so many counted days."""

    part: float
    days: int

    @property
    def counted_s(self) -> float:
        return DAY_S * self.days


def extent_of(judged: Sequence[Judged], part_over: Callable[[int], float]) -> Extent:
    """The fewest days in which every SLO has what it needs; ``part_over`` days: what may be simulated of a fleet.

    Raises InconclusiveError where no number of days suffices: the percentile of so few is not known.
    """
    for days in range(1, MOST_DAYS + 1):
        part = part_over(days)
        if all(each.per_day * days * part >= each.needs for each in judged):
            return Extent(part, days)
    reach = max(days * part_over(days) for days in range(1, MOST_DAYS + 1))
    worst = min(judged, key=lambda each: each.per_day / each.needs)
    raise InconclusiveError(
        f"too few to tell: {worst.slo} needs {worst.needs} {worst.kind}, and no more than about "
        f"{worst.per_day * reach:.0f} can be simulated beside the rest of the load: plan for more {worst.kind}, for "
        "less of the rest, or with an SLO of a lower quantile"
    )
