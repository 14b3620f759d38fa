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

    def with_ladders(self, levels: np.ndarray, compared: np.ndarray | None = None) -> Between:
        """This as a prior, and the logarithms [k] of the factors of k ladders: a scaled inverse chi-square, updated.

        ``compared`` [k]: ladders with the same number were compared with each other (default: all were).
        """
        if math.isinf(self.degrees):
            return self
        _, of = np.unique(np.zeros(len(levels)) if compared is None else compared, return_inverse=True)
        counts = np.bincount(of)
        off = levels - (np.bincount(of, levels) / counts)[of]
        degrees = self.degrees + len(levels) - len(counts)
        squares = self.degrees * self.deviation**2 + float(off @ off)
        return Between(math.sqrt(squares / degrees), degrees)

    def with_another(self, off: float, ladders: int) -> Between:
        """Updated by the logarithm by which one more measurement was off the mean of ``ladders`` others."""
        if math.isinf(self.degrees):
            return self
        degrees = self.degrees + 1
        squares = self.degrees * self.deviation**2 + off**2 * ladders / (ladders + 1)
        return Between(math.sqrt(squares / degrees), degrees)

    def pooled(self, other: Between, prior: Between) -> Between:
        """What two runs of one kind of host say together; both began with ``prior``, which counts once."""
        if any(math.isinf(each.degrees) for each in (self, other, prior)):
            return self if self.deviation >= other.deviation else other
        degrees = self.degrees + other.degrees - prior.degrees
        squares = sum(each.degrees * each.deviation**2 for each in (self, other)) - prior.degrees * prior.deviation**2
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
# Stated, too, of whole runs: hours, and hosts of one kind. No run shows it, so nothing updates it.
ASSUMED_OF_RUNS = Between(0.10, 12)
ALIKE = Between(0.0, math.inf)  # ladders do not differ, as in a simulation
