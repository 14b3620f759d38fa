"""From the trials of a search to its next point: values, fitted physics, predictions for other points, a decision."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.capacity.models.steps import StepTime
from harness.records.schema import Rung
from harness.sweep.optimizer.decide import FLOOR, Aim, Decision, Expected, Seen
from harness.sweep.optimizer.objective import BestRung, Expecting, HighestRate, Value
from harness.sweep.optimizer.optuna_engine import next_point
from harness.sweep.optimizer.physics import MeasuredLadder, Physics, fit_physics
from harness.sweep.optimizer.space import Space
from harness.topology import Knobs, topology_of

_REFIT_AFTER = 1, 3, 6, 12  # numbers of trials after which the physics is refitted; the surrogate uses all trials
_AGAIN = 0.03  # relative difference of the step times of two trials of one deployment
_QUANTILES = -1.28, -0.52, 0.0, 0.52, 1.28  # of a normal distribution, equally likely


@dataclass(frozen=True)
class MeasuredPoint:
    """A point that was measured (or could not be): its value, and the rungs of its VALID ladders."""

    number: int
    value: Value
    rungs: tuple[Rung, ...] = ()


@dataclass(frozen=True)
class Guide:
    """Chooses the points of one search. ``sessions``: the rungs of its ladders; ``defaults``: knobs as deployed.

    The same trials give the same decision, also after a kill: between calls it keeps only what follows from them.
    """

    space: Space
    objective: HighestRate | BestRung
    kind: str
    aim: Aim
    seed: int
    sessions: tuple[int, ...]
    defaults: Knobs
    _fits: dict[str, tuple[list[MeasuredLadder], Physics | None]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def next(self, measured: Sequence[MeasuredPoint], in_flight: Collection[int] = ()) -> Decision:
        """The next point while some are being measured, or the reason to stop."""
        if self.kind != "model":
            seen = [Seen(each.number, each.value.value, each.value.error) for each in measured]
            return next_point(self.space, seen, in_flight, self.kind, None, self.aim, self.seed)
        _, value_of = self._known(measured)
        seen = [Seen(each.number, each.value.value, self._error(each, value_of)) for each in measured]
        return next_point(self.space, seen, in_flight, self.kind, self.expected(measured), self.aim, self.seed)

    def expected(self, measured: Sequence[MeasuredPoint]) -> Expected | None:
        """What the physics predicts for points, or None if the measured ones do not suffice."""
        known, value_of = self._known(measured)
        ladders: dict[str, list[MeasuredLadder]] = {}
        for each in known[: _trials_fitted(len(known))]:
            ladders.setdefault(topology_of(each.point), []).append(each)
        fitted = {topology: physics for topology, own in ladders.items() if (physics := self._fitted(topology, own))}
        if not fitted or value_of is None:
            return None
        values = [each.value.value for each in measured if each.value.value]
        unknown = float(np.exp(np.mean(np.log(values)))) if values else 0.0

        def value(number: int) -> float:
            """The predicted value of a point; for a topology without data, the mean measured value."""
            physics = fitted.get(topology_of(self.space.point(number)))
            return unknown if physics is None else self._value(physics, value_of, number)

        return lambda numbers: np.array([value(int(number)) for number in numbers])

    def _fitted(self, topology: str, own: list[MeasuredLadder]) -> Physics | None:
        """The physics of these ladders; the last fit of a topology is kept, as most trials ask for no other."""
        if topology not in self._fits or self._fits[topology][0] != own:
            self._fits[topology] = own, fit_physics(own, self.defaults)
        return self._fits[topology][1]

    def _known(self, measured: Sequence[MeasuredPoint]) -> tuple[list[MeasuredLadder], Expecting | None]:
        """The points with a value and rungs, and the objective's value as a function of the step time."""
        known = [each for each in measured if each.value.value is not None and each.rungs]
        ladders = [MeasuredLadder(self.space.point(each.number), each.rungs) for each in known]
        return ladders, self.objective.expecting([each.value for each in known], ladders[: _trials_fitted(len(known))])

    def _value(self, physics: Physics, value_of: Expecting, number: int) -> float:
        """The mean over hypothetical trials of the point, whose values scatter widely near an SLO's limit."""
        point = self.space.point(number)
        return float(np.mean(_again(value_of, physics.step_s(point, self.sessions), self.sessions, point)))

    def _error(self, each: MeasuredPoint, value_of: Expecting | None) -> float:
        """The error of a value, including how far another trial may differ: large where an SLO is only just met."""
        if value_of is None or not each.rungs or not each.value.value:
            return each.value.error
        at = {round(rung.sessions): rung.sessions / rung.frames_per_s for rung in each.rungs}
        sessions = sorted(at)
        steps = np.array([at[n] for n in sessions])
        values = np.array(_again(value_of, steps, sessions, self.space.point(each.number)))
        scatter = float(np.std(np.log(np.maximum(values, FLOOR * values.max())))) if values.max() > 0 else 0.0
        return math.hypot(each.value.error, scatter)


def _again(value_of: Expecting, step_s: np.ndarray, sessions: Sequence[float], point: Knobs) -> list[float]:
    """Values of hypothetical trials whose step times are all a little shorter or longer."""
    return [value_of(_step_time(step_s * math.exp(_AGAIN * each), sessions), point) for each in _QUANTILES]


def _step_time(step_s: np.ndarray, sessions: Sequence[float]) -> StepTime:
    values = tuple(step_s.tolist())
    if len(values) == 1:
        return StepTime("linear", (values[0], 0.0))
    return StepTime("piecewise", values, tuple(map(float, sessions)))


def _trials_fitted(trials: int) -> int:
    return max((each for each in _REFIT_AFTER if each <= trials), default=0)
