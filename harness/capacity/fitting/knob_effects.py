"""How much each knob of a sweep mattered: the variance of the answers, split among knobs and pairs of knobs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.errors import InconclusiveError
from harness.topology import Knobs, KnobValue

MAX_CELLS = 200_000
MIN_POINTS = 4
_RIDGE = 1e-3  # of the fit where combinations were not measured: prefers small effects
_PAIR_PENALTY = 10.0  # of a pair's effect relative to that of a single knob


@dataclass(frozen=True)
class Factor:
    """Knobs that always changed together, and their values: one dict of knob to value per level."""

    knobs: tuple[str, ...]
    levels: tuple[Mapping[str, KnobValue | None], ...]


@dataclass(frozen=True)
class Effects:
    """Shares of the variance over the whole grid of levels; with ``rest`` (higher orders) they add up to 1.

    ``main``: by factor. ``pairs``: by pair of factors, beyond their separate effects. ``means`` [levels]: by factor,
    the mean answer at each level over all others. ``filled``: number of cells of the grid that were fitted, not
    measured.
    """

    factors: tuple[Factor, ...]
    main: tuple[float, ...]
    pairs: dict[tuple[int, int], float]
    means: tuple[np.ndarray, ...]
    rest: float
    mean: float
    variance: float
    cells: int
    filled: int

    def total(self, factor: int) -> float:
        """The share of a factor together with all its pairs."""
        return self.main[factor] + sum(share for pair, share in self.pairs.items() if factor in pair)


def find_factors(points: Sequence[Knobs]) -> tuple[Factor, ...]:
    """The factors of a set of points, in the order of their knobs; knobs with one value are excluded."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for knob in dict.fromkeys(knob for point in points for knob in point):
        column = [repr(point.get(knob)) for point in points]
        partition = tuple(column.index(value) for value in column)
        if len(set(partition)) > 1:
            groups.setdefault(partition, []).append(knob)
    return tuple(_factor(points, knobs, partition) for partition, knobs in groups.items())


def _factor(points: Sequence[Knobs], knobs: Sequence[str], partition: Sequence[int]) -> Factor:
    levels = [{knob: points[first].get(knob) for knob in knobs} for first in dict.fromkeys(partition)]
    return Factor(tuple(knobs), tuple(sorted(levels, key=lambda level: _order(level[knobs[0]]))))


def _order(value: KnobValue | None) -> tuple[bool, float, str]:
    number = value if isinstance(value, int | float) else None
    return (number is None, number or 0, repr(value))


def decompose(points: Sequence[Knobs], answers: Sequence[float]) -> Effects:
    """The functional ANOVA (Hoeffding-Sobol) decomposition of the answers over the full grid of levels.

    With f the answer: main effect f_i(x_i) = E[f | x_i] - E f, pair f_ij = E[f | x_i, x_j] - f_i - f_j - E f, share
    = Var(f_i) / Var(f), all levels equally likely (Sobol, Math. Comp. Sim. 55 (2001), eq. 2 to 5). A cell measured
    more than once counts with its mean. Cells that were not measured are filled by a ridge regression on main effects
    and pairs. Raises InconclusiveError for fewer than four points, no factor, equal answers, or too large a grid.
    """
    known = [(point, answer) for point, answer in zip(points, answers, strict=True) if math.isfinite(answer)]
    if len(known) < MIN_POINTS:
        raise InconclusiveError(f"effects need at least {MIN_POINTS} points with an answer, not {len(known)}")
    factors = find_factors([point for point, _ in known])
    shape = tuple(len(factor.levels) for factor in factors)
    if not factors or math.prod(shape) > MAX_CELLS:
        raise InconclusiveError(f"the points span {math.prod(shape)} combinations: effects need 2 to {MAX_CELLS}")
    at = np.array([[_level(factor, point) for factor in factors] for point, _ in known])
    grid, filled = _grid(at, np.array([answer for _, answer in known]), shape)
    if not grid.var() > 0:
        raise InconclusiveError("all points gave the same answer: no knob mattered")
    return _split(factors, grid, filled)


def _level(factor: Factor, point: Knobs) -> int:
    own = {knob: point.get(knob) for knob in factor.knobs}
    return factor.levels.index(own)


def _grid(at: np.ndarray, answers: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The answer in every cell, float [shape], and how many of them were fitted."""
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, tuple(at.T), answers)
    np.add.at(counts, tuple(at.T), 1)
    missing = counts == 0
    grid = np.divide(sums, counts, out=np.zeros(shape), where=~missing)
    if missing.any():
        grid[missing] = _fitted(at, answers, np.argwhere(missing), shape)
    return grid, int(missing.sum())


def _fitted(at: np.ndarray, answers: np.ndarray, wanted: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    mean, known = answers.mean(), _design(at, shape)
    inner = known @ known.T + _RIDGE * np.eye(len(at))
    return mean + _design(wanted, shape) @ (known.T @ np.linalg.solve(inner, answers - mean))


def _design(at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Centred indicators of the levels of each factor and of each pair: float [points, effects]."""
    alone = [np.eye(levels)[at[:, number]] - 1 / levels for number, levels in enumerate(shape)]
    pairs = [
        (one[:, :, None] * other[:, None, :]).reshape(len(at), -1) / math.sqrt(_PAIR_PENALTY)
        for one, other in itertools.combinations(alone, 2)
    ]
    return np.concatenate([*alone, *pairs], axis=1)


def _split(factors: tuple[Factor, ...], grid: np.ndarray, filled: int) -> Effects:
    axes = range(grid.ndim)
    mean, variance = float(grid.mean()), float(grid.var())
    alone = [grid.mean(axis=tuple(axis for axis in axes if axis != number), keepdims=True) for number in axes]
    main = tuple(float(part.var() / variance) for part in alone)
    pairs = {}
    for one, other in itertools.combinations(axes, 2):
        both = grid.mean(axis=tuple(axis for axis in axes if axis not in (one, other)), keepdims=True)
        pairs[one, other] = float((both - alone[one] - alone[other] + mean).var() / variance)
    rest = max(0.0, 1 - sum(main) - sum(pairs.values()))
    means = tuple(part.reshape(-1) for part in alone)
    return Effects(factors, main, pairs, means, rest, mean, variance, grid.size, filled)
