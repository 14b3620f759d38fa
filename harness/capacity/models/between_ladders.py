"""How far whole ladders of one deployment differ, by host, hour and at random: more than the noise of their rungs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

_MOST = 1.5  # of a factor's logarithm: limits the effect of an extreme draw of a variance


@dataclass(frozen=True)
class Between:
    """Relative standard deviation of the factor by which ladders of a deployment differ, known from ``degrees``.

    Infinite degrees: known exactly.
    """

    deviation: float
    degrees: float

    def with_ladders(self, levels: np.ndarray) -> Between:
        """This as a prior, and the logarithms [k] of the factors of k ladders: a scaled inverse chi-square, updated."""
        if math.isinf(self.degrees) or len(levels) < 2:
            return self
        degrees = self.degrees + len(levels) - 1
        squares = self.degrees * self.deviation**2 + float(np.sum((levels - np.mean(levels)) ** 2))
        return Between(math.sqrt(squares / degrees), degrees)

    def draw(self, ladders: int, rng: np.random.Generator, draws: int, of: int | None = None) -> np.ndarray:
        """Factors [draws] by which the true level may differ from the mean of this many ladders: Student's t.

        ``of``: of so many deployments, [of, draws], which share the deviation of each draw.
        """
        known = math.isinf(self.degrees)
        spread = 1.0 if known else np.sqrt(self.degrees / np.maximum(rng.chisquare(self.degrees, draws), 1e-3))
        normal = rng.standard_normal(draws if of is None else (of, draws))
        return np.exp(np.clip(self.error(ladders) * spread * normal, -_MOST, _MOST))

    def error(self, ladders: int) -> float:
        """Relative standard error of the mean of this many ladders."""
        return self.deviation / math.sqrt(ladders)

    def reach(self, ladders: int, confidence: float) -> float:
        """Half the width of the interval of the level, as a logarithm."""
        tail = (1 + confidence) / 2
        quantile = special.ndtri(tail) if math.isinf(self.degrees) else special.stdtrit(self.degrees, tail)
        return float(min(self.error(ladders) * quantile, _MOST))


# Stated, not measured: the prior where few ladders were repeated. Four degrees: three ladders outweigh half of it.
ASSUMED = Between(0.10, 4)
ALIKE = Between(0.0, math.inf)  # ladders do not differ, as in a simulation
