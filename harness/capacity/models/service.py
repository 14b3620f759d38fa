"""Service time of a batch, S(b) = alpha b + tau0, from the executions that Triton counted by batch size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import special

from harness.errors import InconclusiveError
from harness.records.schema import StageStatistics


@dataclass(frozen=True)
class BatchTimes:
    """Mean compute time by batch size: three arrays of one length, in order of batch size."""

    batch_size: np.ndarray
    executions: np.ndarray
    mean_s: np.ndarray

    @classmethod
    def collect(cls, windows: Iterable[StageStatistics]) -> BatchTimes:
        """Add up the batch statistics of one stage over many windows; a batch size never executed is left out."""
        totals: dict[int, tuple[int, int]] = {}
        for batch in (batch for window in windows for batch in window.batches if batch.executions > 0):
            executions, compute_ns = totals.get(batch.batch_size, (0, 0))
            totals[batch.batch_size] = (executions + batch.executions, compute_ns + batch.compute_ns)
        sizes = sorted(totals)
        executions = np.array([totals[size][0] for size in sizes], dtype=float)
        compute_s = np.array([totals[size][1] for size in sizes], dtype=float) / 1e9
        return cls(np.array(sizes, dtype=float), executions, compute_s / np.maximum(executions, 1))


@dataclass(frozen=True)
class ServiceTime:
    """S(b) = alpha_s b + tau0_s in seconds, with confidence intervals and tests of the line by its residuals.

    ``worst_residual``: largest |measured / fitted - 1|. ``runs_p_value``: probability of this few or this many runs of
    residuals of one sign if the line is true (Wald-Wolfowitz); a small value suggests steps or a curve. NaN
    below six batch sizes.
    """

    alpha_s: float
    tau0_s: float
    alpha_interval_s: tuple[float, float]
    tau0_interval_s: tuple[float, float]
    r_squared: float
    worst_residual: float
    runs_p_value: float

    def time_s(self, batch_size: float | np.ndarray) -> float | np.ndarray:
        return self.alpha_s * batch_size + self.tau0_s

    def rate_per_s(self, batch_size: float | np.ndarray) -> float | np.ndarray:
        """mu(b) = b / (alpha b + tau0), requests/s in batches of ``batch_size``."""
        return batch_size / self.time_s(batch_size)


def fit_service_time(times: BatchTimes, confidence: float = 0.95) -> ServiceTime:
    """Weighted least squares of S(b) = alpha b + tau0 (Inoue, arXiv 1912.06322), weights = executions.

    A negative coefficient whose interval includes zero is set to zero; one that is significantly negative is not
    physical. Raises InconclusiveError for that, and for fewer than two batch sizes.
    """
    if len(times.batch_size) < 2:
        raise InconclusiveError(
            f"only {len(times.batch_size)} batch size was executed, two or more are needed: "
            "measure at more sessions, or with a longer delay"
        )
    slope, offset = _weighted_line(times.batch_size, times.mean_s, times.executions)
    slope_error, offset_error, degrees = _line_errors(times, slope, offset)
    reach = special.stdtrit(degrees, (1 + confidence) / 2) if degrees else math.inf
    margins = _times(reach, slope_error), _times(reach, offset_error)
    for name, value, margin in (("alpha", slope, margins[0]), ("tau0", offset, margins[1])):
        if value + (margin if degrees else 0.0) < 0:
            raise InconclusiveError(
                f"{name} = {value * 1e3:.3g} ms is negative, but a service time cannot be: larger batches took less "
                "time than smaller ones; measure again on a quiet machine"
            )
    slope, offset = _hold_at_zero(times, slope, offset)
    residuals = times.mean_s / np.maximum(slope * times.batch_size + offset, 1e-12) - 1
    return ServiceTime(
        alpha_s=slope,
        tau0_s=offset,
        alpha_interval_s=(slope - margins[0], slope + margins[0]),
        tau0_interval_s=(offset - margins[1], offset + margins[1]),
        r_squared=weighted_r_squared(times.mean_s, slope * times.batch_size + offset, times.executions),
        worst_residual=float(np.max(np.abs(residuals))),
        runs_p_value=runs_test(residuals),
    )


def weighted_r_squared(measured: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> float:
    """1 - weighted residual sum of squares / weighted total sum of squares; 1 where nothing varies."""
    total = float(weights @ (measured - np.average(measured, weights=weights)) ** 2)
    left = float(weights @ (measured - fitted) ** 2)
    return 1 - left / total if total > 0 else 1.0


def runs_test(residuals: np.ndarray) -> float:
    """Two-sided p-value of the Wald-Wolfowitz runs test (normal approximation); NaN for fewer than six residuals."""
    signs = np.sign(residuals[residuals != 0])
    above, below = int(np.sum(signs > 0)), int(np.sum(signs < 0))
    n = above + below
    if n < 6 or not above or not below:
        return math.nan
    runs = 1 + int(np.sum(signs[1:] != signs[:-1]))
    mean = 1 + 2 * above * below / n
    variance = (mean - 1) * (mean - 2) / (n - 1)
    return float(2 * special.ndtr(-abs(runs - mean) / math.sqrt(variance)))


def _weighted_line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    x_mean, y_mean = np.average(x, weights=weights), np.average(y, weights=weights)
    slope = float(weights @ ((x - x_mean) * (y - y_mean)) / (weights @ (x - x_mean) ** 2))
    return slope, float(y_mean - slope * x_mean)


def _line_errors(times: BatchTimes, slope: float, offset: float) -> tuple[float, float, int]:
    """Standard errors of slope and offset, and degrees of freedom; infinite errors for two points."""
    x, weights = times.batch_size, times.executions
    degrees = len(x) - 2
    if not degrees:
        return math.inf, math.inf, 0
    variance = float(weights @ (times.mean_s - slope * x - offset) ** 2) / degrees
    x_mean = np.average(x, weights=weights)
    spread = float(weights @ (x - x_mean) ** 2)
    return math.sqrt(variance / spread), math.sqrt(variance * (1 / weights.sum() + x_mean**2 / spread)), degrees


def _hold_at_zero(times: BatchTimes, slope: float, offset: float) -> tuple[float, float]:
    weights, x, y = times.executions, times.batch_size, times.mean_s
    if slope < 0:
        return 0.0, float(np.average(y, weights=weights))
    if offset < 0:
        return float(weights @ (x * y) / (weights @ x**2)), 0.0
    return slope, offset


def _times(reach: float, error: float) -> float:
    return math.inf if math.isinf(reach) else float(reach * error)
