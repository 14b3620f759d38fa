"""The difference of two device counts, with an interval from those of the counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.records.comparison import COUNT, UNKNOWN, Difference, finding_of
from harness.records.plan import Plan, PlannedTarget

_SLACK = 1e-9


def count_differences(a: Plan, b: Plan, reach: np.ndarray, other_terms: str = "") -> Iterator[Difference]:
    """The counts of every target that both plans have; in GPUs where a device of either has several.

    ``reach`` [2]: how far the rate's interval, which holds together with those of all other figures, goes below and
    above its change, as logarithms. ``other_terms``: in what the plans differ, so that their counts answer other
    questions.
    """
    several = max(a.gpus_per_device, b.gpus_per_device) > 1
    name, gpus = ("GPUs", (a.gpus_per_device, b.gpus_per_device)) if several else ("devices", (1, 1))
    of_b = {each.qps: each for each in b.targets}
    for each in a.targets:
        if other := of_b.get(each.qps):
            yield _difference(name, each, other, gpus, reach, other_terms)


def _difference(
    name: str, a: PlannedTarget, b: PlannedTarget, gpus: tuple[int, int], reach: np.ndarray, other_terms: str
) -> Difference:
    (count_a, low_a, high_a), (count_b, low_b, high_b) = _times(a, gpus[0]), _times(b, gpus[1])
    known: dict[str, Any] = {"kind": COUNT, "name": name, "at": a.qps, "a": count_a, "b": count_b}
    known["extrapolated"] = "extrapolated" in (a.basis, b.basis)
    if count_a is None or count_b is None or other_terms:
        missing = " and ".join(side for side, count in (("A", count_a), ("B", count_b)) if count is None)
        note = (
            f"no count is known in {missing}" if missing else f"the plans differ in {other_terms}: so may their counts"
        )
        return Difference(**known, change=None, interval=(None, None), finding=UNKNOWN, note=note)
    own = interval_of_difference((count_a, low_a, high_a), (count_b, low_b, high_b))
    interval = _hull(own, _by_rates(count_a, count_b, reach))
    return Difference(**known, change=count_b - count_a, interval=interval, finding=finding_of(interval))


def _times(target: PlannedTarget, gpus: int) -> tuple[int | None, int | None, int | None]:
    """The count and its interval, in GPUs of which a device has so many."""
    count, low, high = (None if each is None else each * gpus for each in (target.devices, *target.interval))
    return count, low, high


def _by_rates(a: int, b: int, reach: np.ndarray) -> tuple[int | None, int | None]:
    """The interval of b - a if counts are in inverse proportion to rates, whose change may be off by ``reach``."""
    below, above = (float(each) for each in reach)
    low = math.floor(b * math.exp(-above) - a + _SLACK) if math.isfinite(above) else None
    high = math.ceil(b * math.exp(below) - a - _SLACK) if math.isfinite(below) else None
    return low, high


def _hull(one: tuple[int | None, int | None], other: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """The interval that holds both; None on a side where nothing is known in one of them."""
    low = None if one[0] is None or other[0] is None else min(one[0], other[0])
    high = None if one[1] is None or other[1] is None else max(one[1], other[1])
    return low, high


def interval_of_difference(
    a: tuple[int, int | None, int | None], b: tuple[int, int | None, int | None]
) -> tuple[int | None, int | None]:
    """The interval of b - a, each (count, low, high) with an interval of its own, rounded outwards to whole numbers.

    The variances are recovered from the limits (MOVER: Zou and Donner, Statistics in Medicine 27, 2008, equation 4):
    d - sqrt((b - l_b)^2 + (u_a - a)^2) to d + sqrt((u_b - b)^2 + (a - l_a)^2).
    """
    (count_a, low_a, high_a), (count_b, low_b, high_b) = a, b
    change = count_b - count_a
    low = None if low_b is None or high_a is None else change - math.hypot(count_b - low_b, high_a - count_a)
    high = None if high_b is None or low_a is None else change + math.hypot(high_b - count_b, count_a - low_a)
    return (
        None if low is None else math.floor(low + _SLACK),
        None if high is None else math.ceil(high - _SLACK),
    )
