"""From the trials of a search to its next point: values, physics, what they expect of other points, a decision."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.capacity.steps import StepTime
from harness.explore.decide import Aim, Decision, Expected, Seen
from harness.explore.engine import next_point
from harness.explore.model import Physics, Taught, learn
from harness.explore.objective import BestRung, Expecting, HighestRate, Value
from harness.explore.space import Space
from harness.records import Rung

_LESSONS = 1, 2, 3, 5, 8, 12  # numbers of trials after which the physics is fitted anew; the surrogate learns all


@dataclass(frozen=True)
class Measured:
    """A point that was measured (or could not be): its value, and the rungs of its VALID ladders."""

    number: int
    value: Value
    rungs: tuple[Rung, ...] = ()


@dataclass(frozen=True)
class Guide:
    """Chooses the points of one search. ``sessions``: the rungs of its ladders; ``defaults``: knobs as deployed.

    Nothing is remembered between calls: the same trials give the same decision, also after a kill.
    """

    space: Space
    objective: HighestRate | BestRung
    kind: str
    aim: Aim
    seed: int
    sessions: tuple[int, ...]
    defaults: Mapping[str, Any]

    def next(self, measured: Sequence[Measured], in_flight: Collection[int] = ()) -> Decision:
        """The next point, while some are being measured, or the reason to stop."""
        seen = [Seen(each.number, each.value.value, each.value.error) for each in measured]
        expected = self.expected(measured) if self.kind == "model" else None
        return next_point(self.space, seen, in_flight, self.kind, expected, self.aim, self.seed)

    def expected(self, measured: Sequence[Measured]) -> Expected | None:
        """What the physics expects of points, or None where the measured ones do not carry it."""
        known = [each for each in measured if each.value.value is not None and each.rungs]
        taught = [Taught(self.space.point(each.number), each.rungs) for each in known[: _lesson(len(known))]]
        physics = learn(taught, self.defaults) if taught else None
        value_of = self.objective.expecting([each.value for each in known], taught)
        if physics is None or value_of is None:
            return None
        return lambda numbers: np.array([self._value(physics, value_of, int(number)) for number in numbers])

    def _value(self, physics: Physics, value_of: Expecting, number: int) -> float:
        point = self.space.point(number)
        values = tuple(physics.step_s(point, self.sessions).tolist())
        if len(values) == 1:
            return value_of(StepTime("linear", (values[0], 0.0)), point)
        return value_of(StepTime("piecewise", values, tuple(map(float, self.sessions))), point)


def _lesson(trials: int) -> int:
    return max((each for each in _LESSONS if each <= trials), default=0)
