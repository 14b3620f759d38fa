"""Variation of single requests around the fitted means: empirical quantiles, by class where a class has enough."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from harness.records.fit import FittedSample, FittedSpread, FittedStalls, StallLevel

MIN_OF_A_CLASS = 20
PROBABILITIES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Sample:
    """``count`` requests, equivalent to ``independent`` independent ones, and their values at PROBABILITIES."""

    count: int
    independent: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray, rungs: np.ndarray | None = None) -> Sample:
        """A sample of values. ``rungs``: a number for each value; values of one rung may be correlated."""
        independent = len(values) / _design_effect(values, rungs) if rungs is not None else float(len(values))
        return cls(len(values), independent, tuple(float(v) for v in np.quantile(values, PROBABILITIES)))

    def at(self, probability: np.ndarray | float) -> np.ndarray:
        return np.interp(probability, PROBABILITIES, self.quantiles)

    def carries(self, quantile: float) -> bool:
        """Whether at least one request is expected beyond the quantile."""
        return self.count * (1 - quantile) >= 1 - 1e-9

    def record(self) -> FittedSample:
        return FittedSample(count=self.count, independent=self.independent, quantiles=self.by_probability())

    def by_probability(self) -> dict[str, float]:
        return dict(zip(map(str, PROBABILITIES), self.quantiles, strict=True))

    @classmethod
    def of_record(cls, record: FittedSample | StallLevel) -> Sample:
        """From a stored sample, whose probabilities may differ from PROBABILITIES."""
        known = sorted((float(probability), value) for probability, value in record.quantiles.items())
        probabilities, values = zip(*known, strict=True)
        return cls(record.count, record.independent, tuple(np.interp(PROBABILITIES, probabilities, values)))


@dataclass(frozen=True)
class Spread:
    """Ratios measured / fitted of requests: of all together, and of each class with 20 or more."""

    everyone: Sample
    classes: dict[str, Sample] = field(default_factory=dict)

    @classmethod
    def measure(cls, ratios: np.ndarray, classes: np.ndarray, rungs: np.ndarray | None = None) -> Spread:
        rungs = np.arange(len(ratios)) if rungs is None else rungs
        members = {str(name): classes == name for name in np.unique(classes)}
        enough = {name: own for name, own in members.items() if np.sum(own) >= MIN_OF_A_CLASS}
        return cls(Sample.of(ratios, rungs), {name: Sample.of(ratios[own], rungs[own]) for name, own in enough.items()})

    def of(self, traffic_class: str) -> Sample:
        return self.classes.get(traffic_class, self.everyone)

    def record(self) -> FittedSpread:
        every, classes = self.everyone, {name: sample.record() for name, sample in self.classes.items()}
        return FittedSpread(
            count=every.count, independent=every.independent, quantiles=every.by_probability(), classes=classes
        )

    @classmethod
    def of_record(cls, record: FittedSpread) -> Spread:
        return cls(Sample.of_record(record), {name: Sample.of_record(each) for name, each in record.classes.items()})


def _design_effect(values: np.ndarray, rungs: np.ndarray) -> float:
    """Kish: 1 + (m - 1) ICC with m values per rung, ICC by one-way analysis of variance (at least 0)."""
    _, group = np.unique(rungs, return_inverse=True)
    sizes = np.bincount(group)
    groups, n = len(sizes), len(values)
    if groups < 2 or groups == n:
        return 1.0
    means = np.bincount(group, values) / sizes
    within = float(np.sum((values - means[group]) ** 2)) / (n - groups)
    between = float(sizes @ (means - values.mean()) ** 2) / (groups - 1)
    m = (n - float(sizes @ sizes) / n) / (groups - 1)
    if between <= within:
        return 1.0
    return 1 + (m - 1) * (between - within) / (between + (m - 1) * within)


@dataclass(frozen=True)
class StallTable:
    """Longest stall in seconds by step time: ``samples[i]`` at ``levels_s[i]``, linear between levels.

    Above ``reach_s``, the longest mean step of a measured request, a stall is infinite: nothing was measured there.
    """

    levels_s: tuple[float, ...]
    samples: tuple[Sample, ...]
    reach_s: float

    @classmethod
    def measure(cls, step_s: np.ndarray, stall_s: np.ndarray) -> StallTable:
        """Up to four levels with equal numbers of requests, each with 20 or more if there are enough."""
        order = np.argsort(step_s, kind="stable")
        parts = np.array_split(order, max(1, min(4, len(order) // MIN_OF_A_CLASS)))
        levels = tuple(float(step_s[part].mean()) for part in parts)
        return cls(levels, tuple(Sample.of(stall_s[part]) for part in parts), float(step_s.max()))

    def at(self, step_s: np.ndarray, probability: np.ndarray | float) -> np.ndarray:
        rows = np.array([np.broadcast_to(sample.at(probability), np.shape(step_s)) for sample in self.samples])
        place = np.interp(step_s, self.levels_s, np.arange(len(rows)))
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, len(rows) - 1)
        columns = np.arange(rows.shape[1])
        value = rows[below, columns] + (place - below) * (rows[above, columns] - rows[below, columns])
        return np.where(step_s > self.reach_s * 1.05, np.inf, value)

    def carries(self, quantile: float) -> bool:
        return all(sample.carries(quantile) for sample in self.samples)

    def record(self) -> FittedStalls:
        levels = tuple(
            StallLevel(step_s=step_s, count=s.count, independent=s.independent, quantiles=s.by_probability())
            for step_s, s in zip(self.levels_s, self.samples, strict=True)
        )
        return FittedStalls(reach_s=self.reach_s, levels=levels)

    @classmethod
    def of_record(cls, record: FittedStalls) -> StallTable:
        levels = record.levels
        return cls(tuple(each.step_s for each in levels), tuple(map(Sample.of_record, levels)), record.reach_s)
