"""The difference of two device counts, with an interval from those of the counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from harness.records.comparison import COUNT, UNKNOWN, Difference, finding_of
from harness.records.plan import Plan, PlannedTarget

_SLACK = 1e-9


def count_differences(a: Plan, b: Plan) -> Iterator[Difference]:
    """The counts of every target that both plans have; in GPUs where a device of either has several."""
    several = max(a.gpus_per_device, b.gpus_per_device) > 1
    name, gpus = ("GPUs", (a.gpus_per_device, b.gpus_per_device)) if several else ("devices", (1, 1))
    of_b = {each.qps: each for each in b.targets}
    for each in a.targets:
        if other := of_b.get(each.qps):
            yield _difference(name, each, other, gpus)


def _difference(name: str, a: PlannedTarget, b: PlannedTarget, gpus: tuple[int, int]) -> Difference:
    (count_a, low_a, high_a), (count_b, low_b, high_b) = _times(a, gpus[0]), _times(b, gpus[1])
    known: dict[str, Any] = {"kind": COUNT, "name": name, "at": a.qps, "a": count_a, "b": count_b}
    known["extrapolated"] = "extrapolated" in (a.basis, b.basis)
    if count_a is None or count_b is None:
        missing = " and ".join(side for side, count in (("A", count_a), ("B", count_b)) if count is None)
        note = f"no count is known in {missing}"
        return Difference(**known, change=None, interval=(None, None), finding=UNKNOWN, note=note)
    interval = interval_of_difference((count_a, low_a, high_a), (count_b, low_b, high_b))
    return Difference(**known, change=count_b - count_a, interval=interval, finding=finding_of(interval))


def _times(target: PlannedTarget, gpus: int) -> tuple[int | None, int | None, int | None]:
    """The count and its interval, in GPUs of which a device has so many."""
    count, low, high = (None if each is None else each * gpus for each in (target.devices, *target.interval))
    return count, low, high


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
