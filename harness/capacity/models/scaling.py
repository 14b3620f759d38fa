"""The Universal Scalability Law: throughput against concurrency, with contention and coherency."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from harness.capacity.models.steps import count_levels
from harness.errors import InconclusiveError
from harness.records.fit import FittedScaling

MIN_POINTS = 6


@dataclass(frozen=True)
class Scaling:
    """X(N) = gamma N / (1 + sigma (N - 1) + kappa N (N - 1)); each interval is (low, high).

    Gunther, Guerrilla Capacity Planning; gamma is the throughput at concurrency 1.
    ``largest_measured``: the largest N behind the fit; beyond it X(N) is extrapolated.
    """

    gamma: float
    sigma: float
    kappa: float
    gamma_interval: tuple[float, float]
    sigma_interval: tuple[float, float]
    kappa_interval: tuple[float, float]
    r_squared: float
    largest_measured: float

    @classmethod
    def of_record(cls, record: FittedScaling) -> Scaling:
        coefficients = record.gamma, record.sigma, record.kappa
        intervals = record.gamma_interval, record.sigma_interval, record.kappa_interval
        return cls(*coefficients, *intervals, record.r_squared, record.largest_measured)

    def throughput_at_concurrency(self, n: float | np.ndarray) -> float | np.ndarray:
        return _throughput(np.asarray(n, dtype=float), self.gamma, self.sigma, self.kappa)

    def peak_concurrency(self) -> float:
        """N at which throughput is greatest, sqrt((1 - sigma) / kappa); infinite without coherency cost."""
        return math.sqrt(max(1 - self.sigma, 0) / self.kappa) if self.kappa > 0 else math.inf


def fit_scaling(concurrency: np.ndarray, throughput: np.ndarray, confidence: float = 0.95) -> Scaling:
    """Least squares with all three coefficients at or above zero.

    Raises InconclusiveError for fewer than six different concurrencies, values that are not positive and
    finite, or a search that does not converge.
    """
    n, x = np.asarray(concurrency, dtype=float), np.asarray(throughput, dtype=float)
    if (levels := count_levels(n)) < MIN_POINTS:
        raise InconclusiveError(
            f"the scalability law needs {MIN_POINTS} different concurrencies, not {levels}: add rungs to the ladder"
        )
    if not np.all(np.isfinite(n) & np.isfinite(x) & (n > 0) & (x > 0)):
        raise InconclusiveError("a rung has no positive throughput or concurrency: measure it again")
    scale = float(np.max(x / n))
    start = np.array([1.0, 0.01, 0.0001])
    found = optimize.least_squares(
        lambda p: _throughput(n, *p) - x / scale, start, bounds=(0, np.inf), x_scale=[1, 0.01, 0.001]
    )
    if not found.success:
        raise InconclusiveError(f"the scalability law did not converge ({found.message}): add rungs to the ladder")
    return _describe(found, n, x, scale, confidence)


def _describe(found: optimize.OptimizeResult, n: np.ndarray, x: np.ndarray, scale: float, confidence: float) -> Scaling:
    units = np.array([scale, 1.0, 1.0])
    values = found.x * units
    variance = 2 * found.cost / max(len(n) - 3, 1)
    errors = np.sqrt(np.maximum(np.diag(np.linalg.pinv(found.jac.T @ found.jac)) * variance, 0)) * units
    reach = special.stdtrit(len(n) - 3, (1 + confidence) / 2) * errors
    gamma, sigma, kappa = ((float(max(v - r, 0)), float(v + r)) for v, r in zip(values, reach, strict=True))
    left, spread = float(np.sum((x - _throughput(n, *values)) ** 2)), float(np.sum((x - x.mean()) ** 2))
    r_squared = 1 - left / spread if spread > 0 else 1.0  # constant throughput has no variance to explain
    return Scaling(*map(float, values), gamma, sigma, kappa, r_squared, float(n.max()))


def _throughput(n: np.ndarray, gamma: float, sigma: float, kappa: float) -> np.ndarray:
    return gamma * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))
