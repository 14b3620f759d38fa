"""The objective of a search: the value of a measured point, and the value at a predicted step time.

Larger values are better and 0 is useless; None means that the value of a point is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from harness.capacity.fitting.fit import fit_run, limits_of
from harness.capacity.fitting.rate_search import Limits, Traffic, steady_limit
from harness.capacity.models.between_ladders import ALIKE
from harness.capacity.models.device import Device
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.steps import StepTime
from harness.errors import InconclusiveError
from harness.records.fit import FittedDeployment
from harness.records.schema import Rung, Trial
from harness.records.slo import Slo
from harness.sweep.optimizer.physics import MeasuredLadder
from harness.topology import Knobs, number_of
from harness.traffic.mix import Mix

Expecting = Callable[[StepTime, Knobs], float]  # the value of a point, given its step time
Figures = Callable[[str], float]  # of a rung, by the names that plans use
_NORMAL_95 = 1.96
_LEAST = 1e-4


@dataclass(frozen=True)
class Value:
    """The value of a measured point; ``error``: relative, 0 if unknown; ``says``: the value as text."""

    value: float | None
    error: float = 0.0
    says: str = ""
    fit: FittedDeployment | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class HighestRate:
    """Requests/s that one device sustains under the SLOs: the reciprocal of devices per QPS."""

    mix: Mix
    slos: Sequence[Slo]
    seed: int
    kv: KvRoom | Mapping[str, KvRoom | None] | None = None
    session_limit: int | None = None
    name = "highest rate under the SLOs"

    def measured(self, trials: Sequence[Trial], requests: pd.DataFrame, in_rungs: pd.DataFrame | None = None) -> Value:
        """The value from the VALID ladders of one deployment and their requests; see ``fit_run``.

        Its error is that of the rungs: how far whole ladders differ is ``guide._AGAIN``.
        """
        rng = np.random.default_rng(self.seed)
        room = self._room()
        fit = fit_run(trials, requests, self.mix, self.slos, rng, "", in_rungs=in_rungs, between=ALIKE, **room)
        return _value_of(fit.deployments[0])

    def expecting(self, values: Sequence[Value], ladders: Sequence[MeasuredLadder]) -> Expecting | None:
        """The value of a deployment with another step time, whose requests vary like those of the best one measured."""
        for best in sorted(values, key=lambda each: -(each.value or 0.0)):
            if best.fit is None:
                continue
            try:
                device = Device.from_fit(best.fit)
                self._limits(best.fit, {}).check(device, [each.name for each in self.mix.classes])
            except InconclusiveError:
                continue
            return lambda step, point, fit=best.fit, device=device: self._expected(fit, device, step, point)
        return None

    def _expected(self, fit: FittedDeployment, device: Device, step: StepTime, point: Knobs) -> float:
        """The device with another step time, a first chunk of the point's length, and the KV room of its instances."""
        chunk = number_of(fit.deployment, "chunk_frames", self.mix.chunk_frames)
        steps = max(device.first_steps + number_of(point, "chunk_frames", chunk) - chunk, 0.0)
        other = replace(device, step_time=step, first_steps=steps, draws=(), levels=())
        return steady_limit(other, self._limits(fit, point))[0] / self.mix.mean_frames()

    def _limits(self, fit: FittedDeployment, point: Knobs) -> Limits:
        if fit.kv is not None:
            fit = replace(fit, kv=KvRoom.of_record(fit.kv).of(point).record())
        return limits_of(fit, self.slos, self.session_limit, 1.0, self._traffic)

    @cached_property
    def _traffic(self) -> Traffic:
        return Traffic.draw(self.mix, np.random.default_rng(self.seed))

    def _room(self) -> dict[str, Any]:
        return {"kv": self.kv, "session_limit": self.session_limit}


def _value_of(fit: FittedDeployment) -> Value:
    rate, (low, high) = fit.max_rate_per_s, fit.max_rate_interval
    if rate is None:
        return Value(None, says=fit.inconclusive, fit=fit)
    error = math.log(high / low) / (2 * _NORMAL_95) if low and high else 0.0
    return Value(rate, error, f"{rate:.3g} requests/s", fit)


@dataclass(frozen=True)
class BestRung:
    """A metric of a rung's summary, at the rung where it is best among those that meet the limits on other metrics.

    ``sign`` 1 to maximise, -1 to minimise: the value is the metric, or its reciprocal. A minimised metric counts as at
    least 1e-4 (a tenth of a millisecond), so that the value of a metric of 0 is finite.
    """

    metric: str
    sign: int = 1
    at_most: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{'highest' if self.sign > 0 else 'lowest'} {self.metric}"

    def measured(
        self, trials: Sequence[Trial], requests: pd.DataFrame | None = None, in_rungs: pd.DataFrame | None = None
    ) -> Value:
        summaries = [rung.summary.figure for trial in trials for rung in trial.rungs]
        if not summaries:
            return Value(None, says="its ladders have no rung")
        best = self._best(summaries)
        says = "no rung meets the limits" if best is None else f"{self.metric} {best:.4g}"
        return Value(self._worth(best), says=says)

    def value(self, summaries: Sequence[Figures]) -> float:
        """The metric of the best rung; 0 where none meets the limits."""
        return self._worth(self._best(summaries))

    def _best(self, summaries: Sequence[Figures]) -> float | None:
        """The metric where it is best; None where no rung meets the limits and has it."""
        kept = [each(self.metric) for each in summaries if self._keeps(each)]
        return max((each for each in kept if each >= 0), key=lambda each: self.sign * each, default=None)

    def _worth(self, metric: float | None) -> float:
        if metric is None:
            return 0.0
        return metric if self.sign > 0 else 1 / max(metric, _LEAST)

    def expecting(self, values: Sequence[Value], ladders: Sequence[MeasuredLadder]) -> Expecting | None:
        """Assumes that times grow in proportion to the step time at as many sessions, and rates fall in proportion."""
        rungs = [rung for each in ladders for rung in each.rungs]
        if not rungs:
            return None
        names = {self.metric, *self.at_most, *self.at_least}
        at = {round(rung.sessions): _scales([r for r in rungs if round(r.sessions) == round(rung.sessions)], names)
              for rung in rungs}  # fmt: skip
        return lambda step, point: self.value([_predicted(scales, n, float(step(n))) for n, scales in at.items()])

    def _keeps(self, figures: Figures) -> bool:
        return all(figures(name) <= limit for name, limit in self.at_most.items()) and all(
            figures(name) >= limit for name, limit in self.at_least.items()
        )


def _power(name: str) -> int:
    """The exponent with which a metric depends on the step time: 1, -1, or 0 for no dependence."""
    if name == "sessions":
        return 0
    return -1 if name.endswith("_per_s") else 1


def _scales(rungs: Sequence[Rung], names: Collection[str]) -> dict[str, float]:
    """Median over the rungs of each metric / (step time to the power of its exponent)."""
    steps = np.array([rung.sessions / rung.frames_per_s for rung in rungs])
    return {
        name: float(np.median([rung.summary.figure(name) for rung in rungs] / steps ** _power(name))) for name in names
    }


def _predicted(scales: Mapping[str, float], sessions: float, step_s: float) -> Figures:
    figures = {name: scale * step_s ** _power(name) for name, scale in scales.items()} | {"sessions": sessions}
    return lambda name: figures.get(name, math.nan)
