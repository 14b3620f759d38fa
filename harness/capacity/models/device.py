"""One device as fit.json describes it: step time, TTFA, and the variation of single requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from harness import wire
from harness.capacity.models.spreads import Sample, Spread, StallTable
from harness.capacity.models.steps import StepTime
from harness.errors import InconclusiveError
from harness.records.fit import FittedDeployment, FittedModel, fitted

METRIC_NAMES = {"ttfa_s": "ttfa", "rtf": "rtf", "stall_longest_s": "longest stall"}


@dataclass(frozen=True)
class Device:
    """Time to first audio = (base_s + first_steps x step time at the start) x a ratio drawn from ``ttfa``.

    RTF = mean step time of the session / seconds of a frame x a ratio drawn from ``rtf``; longest stall from
    ``stalls`` by class ("" = all classes) at the mean step time. ``draws`` [d, values]: alternatives of the step time
    by the noise of rungs; ``levels`` [d]: their factors, by the variation between ladders; empty where that is unknown.
    """

    step_time: StepTime
    base_s: float
    first_steps: float
    ttfa: Spread
    rtf: Spread
    stalls: dict[str, StallTable]
    max_sessions: float
    draws: tuple[tuple[float, ...], ...]
    levels: tuple[float, ...] = ()

    @classmethod
    def from_fit(cls, fit: FittedDeployment | FittedModel) -> Device:
        """From a deployment of fit.json, or from the ``model`` of a prediction. Raises InconclusiveError."""
        step, audio, rtf = fitted(fit.step_time), fitted(fit.first_audio), fitted(fit.rtf)
        return cls(
            StepTime.of_record(step),
            audio.base_s,
            audio.steps,
            Spread.of_record(audio.spread),
            Spread.of_record(rtf.spread),
            {name: StallTable.of_record(table) for name, table in fit.stalls.items()},
            step.max_sessions,
            step.draws,
            step.levels,
        )

    def alternatives(self) -> Iterator[Device]:
        """This device with each of the drawn step times, each at its drawn level."""
        for draw, level in zip(self.draws, self.levels or (1.0,) * len(self.draws), strict=True):
            yield replace(self, step_time=replace(self.step_time, values=tuple(level * value for value in draw)))

    def same_level(self) -> Device:
        """This device without the variation between ladders."""
        return replace(self, levels=())

    @property
    def first_audio(self) -> tuple[float, float]:
        return self.base_s, self.first_steps

    def ratios(self, traffic_class: str, metric: str) -> Sample | StallTable:
        """The ratios of ``metric`` of a class to its mean. Raises InconclusiveError where no stall was measured."""
        if metric != "stall_longest_s":
            return (self.ttfa if metric == "ttfa_s" else self.rtf).of(traffic_class)
        table = self.stalls.get(traffic_class) or self.stalls.get("")
        if table is None:
            raise InconclusiveError("no stall was measured: drive requests of two chunks or more")
        return table

    def at_constant_step(
        self, traffic_class: str, metric: str, quantile: np.ndarray | float, step_s: np.ndarray
    ) -> np.ndarray:
        """``quantile`` of ``metric`` for requests during which every frame step takes ``step_s`` seconds."""
        scatter = self.ratios(traffic_class, metric)
        if isinstance(scatter, StallTable):
            return scatter.at(step_s, quantile)
        mean = self.base_s + self.first_steps * step_s if metric == "ttfa_s" else step_s / wire.SECONDS_PER_FRAME
        return mean * scatter.at(quantile)


def slo_name(traffic_class: str, metric: str, quantile: float) -> str:
    """The name of an SLO, such as "rtf p95 of class long"."""
    return f"{METRIC_NAMES[metric]} p{quantile * 100:g} of class {traffic_class}"
