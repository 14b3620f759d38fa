"""A number that is not known exactly: its range, its likely value, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import InputError

LOW, MIDDLE, HIGH = 0.025, 0.5, 0.975  # places in a range: the middle is the likely value
DRAWS = 400
Number = Any  # a float, or an array of one value per draw
Draw = Mapping[str, Number]
"""For each unknown by its name, its place in its range: 0 its low end, 0.5 its likely value, 1 its high end."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """``low`` to ``high``, ``likely`` in between; all above 0. Raises InputError for any other order."""

    low: float
    likely: float
    high: float
    source: str = ""

    def __post_init__(self) -> None:
        numbers = self.low, self.likely, self.high
        if not (all(map(math.isfinite, numbers)) and 0 < self.low <= self.likely <= self.high):
            shown = ", ".join(f"{each:g}" for each in numbers)
            raise InputError(f"a range of {shown} is impossible: give low <= likely <= high, all above 0")

    @classmethod
    def around(cls, value: float, factor: float, source: str) -> Range:
        """``value`` divided and multiplied by ``factor`` (1 or more)."""
        return cls(low=value / factor, likely=value, high=value * factor, source=source)

    def at(self, place: Number) -> Number:
        """The value at a place: geometric from low to likely, and from likely to high.

        Places that are uniform from 0 to 1 give values whose median is ``likely``.
        """
        logs = np.log([self.low, self.likely, self.high])
        return np.exp(np.interp(place, (0.0, MIDDLE, 1.0), logs))

    @property
    def width(self) -> float:
        """How far the ends lie apart: high / low."""
        return self.high / self.low


def at(ranges: Mapping[str, Range], draw: Draw) -> dict[str, Number]:
    """The value of each range by its name; one that the draw leaves out has its likely value."""
    return {name: each.at(draw.get(name, MIDDLE)) for name, each in ranges.items()}


def draws_of(names: Iterable[str], rng: np.random.Generator, count: int = DRAWS) -> dict[str, np.ndarray]:
    """Independent places of each unknown [count], evenly spaced from 0 to 1 (a Latin hypercube)."""
    return {name: (rng.permutation(count) + 0.5) / count for name in names}
