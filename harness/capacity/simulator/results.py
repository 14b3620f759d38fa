"""The results of a simulation: counts, distributions and loads by class and over time, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from harness.capacity.simulator import compiled as names
from harness.capacity.simulator.layout import Arrays
from harness.capacity.simulator.structures import BINS, BINS_PER_OCTAVE, HIGHEST_EXPONENT, LOWEST_EXPONENT
from harness.errors import InconclusiveError

METRIC_INDEX = {
    "wait_s": names.WAIT,
    "ttfa_s": names.TTFA,
    "rtf": names.RTF,
    "stall_s": names.STALL,
    "stay_s": names.STAY,
}
_COLUMNS = {
    "arrived": names.ARRIVED,
    "done": names.DONE,
    "refused": names.REFUSED,
    "gave_up": names.GAVE_UP,
    "lost": names.LOST,
    "good": names.GOOD,
}


def bin_edges() -> np.ndarray:
    """Lower edges of the bins [BINS + 1]: 0, then 128 per power of two from 2^-14 to 2^22, then infinite."""
    octaves = 2.0 ** np.arange(LOWEST_EXPONENT, HIGHEST_EXPONENT)[:, None]
    inside = (octaves * (1 + np.arange(BINS_PER_OCTAVE) / BINS_PER_OCTAVE)).ravel()
    return np.concatenate([[0.0], inside, [2.0**HIGHEST_EXPONENT, math.inf]])


_EDGES = bin_edges()


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval, from the variation of batches or of replications."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, parts: Sequence[float], confidence: float = 0.95) -> Estimate:
        """Student's t on the parts, around ``value``; infinite for fewer than two finite parts."""
        known = np.array([part for part in parts if math.isfinite(part)])
        if len(known) < 2 or not math.isfinite(value):
            return cls(value, -math.inf, math.inf)
        reach = special.stdtrit(len(known) - 1, (1 + confidence) / 2) * known.std(ddof=1) / math.sqrt(len(known))
        return cls(value, value - reach, value + reach)


@dataclass(frozen=True, eq=False)
class MetricBins:
    """A metric of a class: ``bins`` [batches, BINS] counts of values, ``sums`` [batches] of the finite ones."""

    bins: np.ndarray
    sums: np.ndarray

    @property
    def count(self) -> int:
        return int(self.bins.sum())

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN if there are none."""
        return float(self.sums.sum() / finite) if (finite := self._finite().sum()) else math.nan

    def mean_with_interval(self, confidence: float = 0.95) -> Estimate:
        finite = self._finite()
        return Estimate.of(self.mean, self.sums[finite > 0] / finite[finite > 0], confidence)

    def share_above(self, value: float) -> float:
        """The share of values above ``value``, linear within a bin; for 0, the share of values of 61 µs and more."""
        counts, index = self.bins.sum(axis=0), int(np.searchsorted(_EDGES, value, side="right")) - 1
        low, high = _EDGES[index], _EDGES[index + 1]
        above = float(index == BINS - 1) if index in (0, BINS - 1) else (high - value) / (high - low)
        return float((counts[index + 1 :].sum() + above * counts[index]) / max(self.count, 1))

    def quantile(self, probability: float) -> float:
        """The quantile, to within half a bin (0.4%); infinite where it falls among sessions without audio.

        Raises InconclusiveError where nothing was counted.
        """
        return _quantile(self.bins.sum(axis=0), probability)

    def _finite(self) -> np.ndarray:
        return self.bins[:, :-1].sum(axis=1)


def _quantile(counts: np.ndarray, probability: float) -> float:
    total = np.cumsum(counts)
    if not total[-1]:
        raise InconclusiveError("no session was counted: simulate for longer")
    rank = probability * total[-1]
    index = min(int(np.searchsorted(total, max(rank, 1.0) - 1e-9)), BINS - 1)
    if index == 0 or index == BINS - 1:
        return 0.0 if index == 0 else math.inf
    inside = (rank - (total[index] - counts[index])) / counts[index]
    return float(_EDGES[index] + min(max(inside, 0.0), 1.0) * (_EDGES[index + 1] - _EDGES[index]))


@dataclass(frozen=True, eq=False)
class ClassResult:
    """One class. Counts are of sessions that arrived in the counted time, whenever they ended, by window [windows]."""

    arrived: np.ndarray
    done: np.ndarray
    refused: np.ndarray
    gave_up: np.ndarray
    lost: np.ndarray
    good: np.ndarray
    window_s: float
    wait_s: MetricBins
    ttfa_s: MetricBins
    rtf: MetricBins
    stall_s: MetricBins
    stay_s: MetricBins

    @property
    def unfinished(self) -> int:
        """Sessions still waiting or in progress at the end."""
        return int((self.arrived - self.done - self.refused - self.gave_up - self.lost).sum())

    def goodput_per_s(self, confidence: float = 0.95) -> Estimate:
        """Sessions/s that met every limit of their class; the interval is from the batches."""
        parts = self.good.reshape(len(self.wait_s.bins), -1).mean(axis=1) / self.window_s
        return Estimate.of(float(parts.mean()), parts, confidence)

    def busy_share(self) -> float:
        """The share that was rejected as busy, at once or after waiting."""
        return float((self.refused + self.gave_up).sum() / max(self.arrived.sum(), 1))


@dataclass(frozen=True, eq=False)
class PoolResult:
    """A pool: its classes, and means of each window [windows] of the sessions and devices that it had.

    ``most_owned``: the most devices at any time of a window.
    """

    classes: dict[str, ClassResult]
    window_s: float
    sessions: np.ndarray
    waiting: np.ndarray
    busy_devices: np.ndarray
    devices_up: np.ndarray
    devices_owned: np.ndarray
    most_owned: np.ndarray

    @property
    def utilisation(self) -> float:
        """Time in which devices had a session / time in which they were up."""
        return float(self.busy_devices.sum() / self.devices_up.sum())

    @property
    def device_hours(self) -> float:
        """Hours of all devices except those that are off: the hours that are paid for."""
        return float(self.devices_owned.sum() * self.window_s / 3600)


def result_of(arrays: Arrays, classes: Sequence[str], numbers: Sequence[int], window_s: float) -> PoolResult:
    """Read an engine's arrays: the classes of these ``numbers``, by name."""
    by_class = {name: _class_result(arrays, index, window_s) for name, index in zip(classes, numbers, strict=True)}
    means = {name: arrays.areas[name] / window_s for name in arrays.areas.dtype.names}
    return PoolResult(
        by_class,
        window_s,
        sessions=means["active_s"],
        waiting=means["waiting_s"],
        busy_devices=means["busy_s"],
        devices_up=means["up_s"],
        devices_owned=means["owned_s"],
        most_owned=arrays.areas["most_owned"].copy(),
    )


def _class_result(arrays: Arrays, index: int, window_s: float) -> ClassResult:
    counts: dict[str, Any] = {name: arrays.counts[:, index, column].copy() for name, column in _COLUMNS.items()}
    metrics: dict[str, Any] = {
        name: MetricBins(arrays.bins[:, index, metric].copy(), arrays.sums[:, index, metric].copy())
        for name, metric in METRIC_INDEX.items()
    }
    return ClassResult(**counts, window_s=window_s, **metrics)
