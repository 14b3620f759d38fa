"""A Gaussian process of the physics' residuals: logarithm of measured over predicted, over the knobs.

Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), algorithm 2.1. Hyperparameters are averaged
over draws of their prior, weighted by marginal likelihood: with few trials a single best choice is unreliable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import logsumexp

PRIOR_DRAWS = 384
KEPT = 12
_JITTER, _ROUGH = 1e-9, 1e-6  # added to variances: of measured values, and of draws (0.1% of a value)
_TRUST = 4  # weight of the prior's spread, as a number of values
_OFFSET_SD, _SLOPE_SD = 0.5, 0.25  # the physics may be wrong by a factor, and in the size of differences


@dataclass(frozen=True)
class Hyperparameters:
    """One set of hyperparameters: relative sizes of main effects and of interactions, length scales [d], noise."""

    main: np.ndarray
    joint: float
    lengths: np.ndarray
    noise: float

    def kernel(self, left: np.ndarray, right: np.ndarray, spread: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Covariance [left, right]: offset, slope on the prediction, an effect of each knob, and of all together."""
        gaps = np.abs(left[:, None, :] - right[None, :, :]) / self.lengths
        covariance = _matern(np.sqrt(np.sum(gaps**2, axis=2))) * self.joint**2
        if self.lengths.size:
            covariance += _matern(gaps) @ self.main**2
        slopes = np.outer(spread[0], spread[1]) * _SLOPE_SD**2
        return covariance + slopes + _OFFSET_SD**2


@dataclass(frozen=True)
class Surrogate:
    """Posterior draws of the logarithm of a value at any point, given the measured ones.

    ``x`` [n, d] coordinates, ``base`` [n] logarithm of predictions, ``y`` [n] logarithm of values, ``error`` [n] their
    relative standard errors (0 = unknown; the noise is then estimated).
    """

    x: np.ndarray
    base: np.ndarray
    y: np.ndarray
    error: np.ndarray
    draws: tuple[Hyperparameters, ...]
    centre: float

    @classmethod
    def fit(
        cls, x: np.ndarray, base: np.ndarray, y: np.ndarray, error: np.ndarray, rng: np.random.Generator
    ) -> Surrogate:
        prior = [_prior(x.shape[1], rng) for _ in range(PRIOR_DRAWS)]
        centre = float(np.mean(base)) if len(base) else 0.0
        bare = cls(x, base, y, error, (), centre)
        weights = bare._evidence(prior)
        chances = np.exp(weights - logsumexp(weights))
        # Systematic resampling: each draw is kept about as often as its weight says.
        places = (np.arange(KEPT) + rng.random()) / KEPT
        kept = np.minimum(np.searchsorted(np.cumsum(chances), places), len(prior) - 1)
        return cls(x, base, y, error, tuple(prior[index] for index in kept), centre)

    def moments(self, x: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [m] of the logarithm of the value at other points."""
        parts = [self._posterior(draw, x, base, False) for draw in self.draws]
        means = np.array([mean for mean, _ in parts])
        variance = np.mean([spread for _, spread in parts], axis=0) + means.var(axis=0)
        return means.mean(axis=0), np.sqrt(np.maximum(variance, 0))

    def sample(self, x: np.ndarray, base: np.ndarray, each: int, rng: np.random.Generator) -> np.ndarray:
        """Joint draws [draws x each, m] of the logarithm of the true value at other points.

        They follow a multivariate t: wider where leave-one-out predictions were worse than estimated.
        """
        found, degrees = [], _TRUST + len(self.y)
        for draw in self.draws:
            mean, covariance = self._posterior(draw, x, base, True)
            root = np.linalg.cholesky(covariance + _ROUGH * np.eye(len(mean)))
            wider = self._surprise(draw) * np.sqrt(degrees / rng.chisquare(degrees, (each, 1)))
            found.append(mean + wider * (rng.standard_normal((each, len(mean))) @ root.T))
        return np.concatenate(found)

    def _gram(self, draw: Hyperparameters) -> np.ndarray:
        spread = self.base - self.centre
        noise = np.where(self.error > 0, np.hypot(self.error, draw.noise / 2), draw.noise)
        return draw.kernel(self.x, self.x, (spread, spread)) + np.diag(noise**2 + _JITTER)

    def _evidence(self, draws: Sequence[Hyperparameters]) -> np.ndarray:
        """Logarithm of the marginal likelihood under each draw, up to a constant (equation 2.30 there)."""
        roots = np.linalg.cholesky(np.stack([self._gram(draw) for draw in draws]))
        white = np.linalg.solve(roots, np.broadcast_to((self.y - self.base)[:, None], (len(draws), len(self.y), 1)))
        return -np.sum(white**2, axis=(1, 2)) / 2 - np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)

    def _posterior(
        self, draw: Hyperparameters, x: np.ndarray, base: np.ndarray, joint: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        own, other = base - self.centre, self.base - self.centre
        prior = draw.kernel(x, x, (own, own)) if joint else self._own_variance(draw, own)
        if not len(self.y):
            return base.copy(), prior
        root = cholesky(self._gram(draw), lower=True)
        across = draw.kernel(self.x, x, (other, own))
        mean = base + across.T @ cho_solve((root, True), self.y - self.base)
        white = solve_triangular(root, across, lower=True)
        return mean, prior - (white.T @ white if joint else np.sum(white**2, axis=0))

    def _surprise(self, draw: Hyperparameters) -> float:
        """Ratio of actual to estimated leave-one-out errors, at least 1 (section 5.4.2 there)."""
        if not len(self.y):
            return 1.0
        inverse = np.linalg.inv(self._gram(draw))
        squares = (inverse @ (self.y - self.base)) ** 2 / np.diagonal(inverse)
        return math.sqrt(max((_TRUST + float(squares.sum())) / (_TRUST + len(self.y)), 1.0))

    @staticmethod
    def _own_variance(draw: Hyperparameters, own: np.ndarray) -> np.ndarray:
        return draw.joint**2 + float(np.sum(draw.main**2)) + own**2 * _SLOPE_SD**2 + _OFFSET_SD**2


def _prior(dimensions: int, rng: np.random.Generator) -> Hyperparameters:
    """Draw: effects of 5 to 15% for most knobs, more for a few; length scales near the range; noise of 1 to 8%."""
    overall = 0.16 * math.exp(0.9 * rng.standard_normal())
    main = overall * np.exp(1.0 * rng.standard_normal(dimensions)) / math.sqrt(max(dimensions, 1))
    joint = overall * math.exp(0.7 * rng.standard_normal()) * 0.6
    lengths = np.exp(math.log(0.9) + 0.7 * rng.standard_normal(dimensions))
    return Hyperparameters(main, joint, lengths, 0.025 * math.exp(0.5 * rng.standard_normal()))


def _matern(distance: np.ndarray) -> np.ndarray:
    """Matern 5/2 at a scaled distance (equation 4.17 there)."""
    scaled = math.sqrt(5) * distance
    return (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
