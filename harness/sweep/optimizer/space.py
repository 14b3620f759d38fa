"""A search space as columns of values: points by number, neighbours, and coordinates for the surrogate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.topology import Knobs, applicable

MOST_CANDIDATES = 2048  # points compared with each other at one time
Part = Knobs  # what a value of a column sets, e.g. one delay of three stages


@dataclass(frozen=True)
class Space:
    """Columns of parts. A point takes one part of each; later columns override earlier ones.

    Points are numbered 0 to size - 1 as in ``itertools.product``: the last column varies fastest. A point has only the
    knobs of its topology, so several numbers may be the same point; ``lowest`` is the number that represents it.
    """

    columns: tuple[tuple[Part, ...], ...]

    def __post_init__(self):
        if not all(self.columns):
            raise InputError("every column of a space needs at least one value")

    @property
    def names(self) -> tuple[str, ...]:
        """A name per column: its knob, or that of all stages; columns of equal names get their index added."""
        names = [_name(column[0]) for column in self.columns]
        return tuple(f"{name} {at}" if name in names[:at] else name for at, name in enumerate(names))

    @property
    def ordered(self) -> tuple[bool, ...]:
        """Whether the values of a column are rising numbers."""
        return tuple(map(_ordered, self.columns))

    @property
    def size(self) -> int:
        return math.prod(map(len, self.columns))

    def point(self, number: int) -> Knobs:
        """The point of a number."""
        return applicable(self._all_knobs(self._levels(number)))

    def lowest(self, number: int) -> int:
        """The lowest number of the same point: columns without effect at this point are set to their first values."""
        levels = self._levels(number)
        has = applicable(self._all_knobs(levels))
        turned = [
            any(knob in has for knob in column[level]) for column, level in zip(self.columns, levels, strict=True)
        ]
        return self._number(level if turns else 0 for level, turns in zip(levels, turned, strict=True))

    def _all_knobs(self, levels: Sequence[int]) -> Knobs:
        parts = (column[level] for column, level in zip(self.columns, levels, strict=True))
        return {knob: value for part in parts for knob, value in part.items()}

    def number(self, point: Knobs) -> int | None:
        """The lowest number of a point, or None for one outside this space."""
        fitting = [
            [level for level, part in enumerate(column) if self._may_be(index, part, point)]
            for index, column in enumerate(self.columns)
        ]
        found = (self._number(levels) for levels in itertools.product(*fitting))
        return next((number for number in found if self.point(number) == dict(point)), None)

    def levels(self, number: int) -> dict[str, int]:
        """The index of each column's value, by name."""
        return dict(zip(self.names, self._levels(number), strict=True))

    def at(self, levels: Mapping[str, int]) -> int:
        """The number of the point with these indices."""
        return self._number(levels[name] for name in self.names)

    def neighbours(self, number: int) -> list[int]:
        """Points that differ in one column: by one step where values are ordered, in any way where they are not."""
        levels = self._levels(number)
        found = []
        for index, column in enumerate(self.columns):
            near = range(levels[index] - 1, levels[index] + 2) if _ordered(column) else range(len(column))
            for level in near:
                if level != levels[index] and 0 <= level < len(column):
                    found.append(self.lowest(self._number([*levels[:index], level, *levels[index + 1 :]])))
        return [each for each in dict.fromkeys(found) if each != self.lowest(number)]

    def candidates(self, around: Iterable[int], rng: np.random.Generator, most: int = MOST_CANDIDATES) -> list[int]:
        """All points if there are few; otherwise a random subset with those ``around`` and their neighbours."""
        if self.size <= most:
            return sorted({self.lowest(number) for number in range(self.size)})
        around = list(around)
        near = {near for number in around for near in (number, *self.neighbours(number))}
        some = {self.lowest(int(number)) for number in rng.integers(0, self.size, most)}
        return sorted(near | some)

    def middle(self) -> int:
        """The point in the middle of every ordered column, and at the start of the others."""
        return self.lowest(self._number([(len(column) - 1) // 2 if _ordered(column) else 0 for column in self.columns]))

    def coordinates(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Float [points, dimensions] in 0 to 1: one dimension per column of numbers, one per value of any other column.

        The coordinate of a number is the mean of its rank and of its logarithm, both scaled to 0 to 1.
        """
        levels = np.array([self._levels(number) for number in numbers], dtype=int).reshape(len(numbers), -1)
        tables = [_places(column) for column in self.columns if len(column) > 1]
        used = [index for index, column in enumerate(self.columns) if len(column) > 1]
        parts = [table[levels[:, index]] for index, table in zip(used, tables, strict=True)]
        return np.hstack(parts) if parts else np.zeros((len(numbers), 0))

    def _levels(self, number: int) -> list[int]:
        if not 0 <= number < self.size:
            raise IndexError(f"point {number} of a space of {self.size}")
        levels = []
        for column in reversed(self.columns):
            number, level = divmod(number, len(column))
            levels.append(level)
        return levels[::-1]

    def _number(self, levels: Iterable[int]) -> int:
        number = 0
        for column, level in zip(self.columns, levels, strict=True):
            number = number * len(column) + level
        return number

    def _may_be(self, index: int, part: Part, point: Knobs) -> bool:
        """Whether the point has the part's knobs, except for those that a later column overrides."""
        later = {knob for column in self.columns[index + 1 :] for knob in column[0]}
        has = applicable({**part, **point})
        return all(knob in later or knob not in has or point.get(knob) == value for knob, value in part.items())


def _ordered(column: Sequence[Part]) -> bool:
    values = [_only(part) for part in column]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and values == sorted(values)


def _name(part: Part) -> str:
    knobs = list(part)
    return knobs[0] if len(knobs) == 1 else knobs[0].rpartition(".")[2]


def _only(part: Part) -> Any:
    """The value that a part sets, the same for all its knobs."""
    return next(iter(part.values()))


def _places(column: Sequence[Part]) -> np.ndarray:
    if not _ordered(column):
        return np.eye(len(column)) / math.sqrt(2)  # any two values have distance 1
    values = np.array([_only(part) for part in column], dtype=float)
    rank = np.arange(len(column)) / (len(column) - 1)
    least = np.min(np.abs(values[values != 0]), initial=math.inf)
    logs = np.sign(values) * np.log1p(np.abs(values) / least)
    return ((rank + (logs - logs[0]) / (logs[-1] - logs[0])) / 2)[:, None]
