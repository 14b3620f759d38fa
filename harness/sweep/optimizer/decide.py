"""The choice of the next trial, and the stopping rule of the search: history in, decision out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from harness.sweep.optimizer.space import Space
from harness.sweep.optimizer.surrogate import Surrogate

Expected = Callable[[Sequence[int] | np.ndarray], np.ndarray]  # values that the physics predicts at points, 0 or more
_CONTENDERS, _SAMPLES_EACH = 200, 64
FLOOR = 0.05  # of the best value: smaller values are all equally bad
_SURE_AFTER = 4  # trials before any confidence is claimed


@dataclass(frozen=True)
class Seen:
    """A measured point: its value (larger is better, 0 = useless), or None where it could not be measured.

    ``error``: relative standard error of the value, 0 if unknown.
    """

    number: int
    value: float | None
    error: float = 0.0


@dataclass(frozen=True)
class Aim:
    """When to stop: an untried point beats the best by more than ``margin`` with probability below 1 - ``sure``.

    The search also stops once ``most`` points were tried.
    """

    margin: float = 0.02
    sure: float = 0.9
    most: int = 1 << 30


@dataclass(frozen=True)
class Decision:
    """The next point's number, or None and the reason to stop.

    ``best``: the measured point estimated to be best, None before any. ``confidence``: the probability that it lies
    within the margin of the best of the ``weighed`` points. ``gain``: expected gain of the next trial, relative to the
    best.
    """

    number: int | None
    reason: str
    best: int | None
    confidence: float
    gain: float
    weighed: int


@dataclass(frozen=True)
class Outlook:
    """The estimates for the candidates: which may be tried, draws of their values, and the best one."""

    numbers: np.ndarray
    open: np.ndarray  # may still be tried
    draws: np.ndarray  # [draws, candidates], logarithms
    best: int | None  # its index


def decide(
    space: Space, seen: Sequence[Seen], in_flight: Collection[int], expected: Expected | None, aim: Aim, seed: int
) -> Decision:
    """The next point to measure, or why there is none. The same history and seed give the same decision.

    Points ``in_flight`` are assumed to turn out as estimated. ``expected`` None: nothing is known of the stages yet.
    """
    rng = np.random.default_rng([seed, len(seen), len(in_flight)])
    tried = {each.number for each in seen} | set(in_flight)
    if not tried:
        return Decision(space.middle(), "", None, 0.0, math.inf, space.size)
    with threadpool_limits(1):  # matrices are small: more threads mostly wait for each other
        outlook = _outlook(space, seen, tried, expected, rng)
    confidence, doubt = _certainty(outlook, aim.margin)
    best = None if outlook.best is None else int(outlook.numbers[outlook.best])
    reason = _reason_to_stop(space, outlook, len(tried), doubt, aim)
    if reason:
        return Decision(None, reason, best, confidence, 0.0, len(outlook.numbers))
    index, gain = _most_telling(outlook)
    return Decision(int(outlook.numbers[index]), "", best, confidence, gain, len(outlook.numbers))


def _outlook(
    space: Space, seen: Sequence[Seen], tried: Collection[int], expected: Expected | None, rng: np.random.Generator
) -> Outlook:
    measured = [each for each in seen if each.value is not None]
    leaders = sorted(measured, key=lambda each: -(each.value or 0.0))[:5]
    near = [each.number for each in leaders]
    numbers = np.array(sorted({*space.candidates(near, rng), *(each.number for each in measured)}))
    x, base = space.coordinates(numbers), _logarithms(expected, numbers, measured)
    surrogate = _learnt(numbers, x, base, measured, set(tried) - {each.number for each in seen}, rng)
    means, spreads = surrogate.moments(x, base)
    known = np.isin(numbers, near)
    lost = np.isin(numbers, [each.number for each in seen if each.value is None])
    contenders = np.argsort(np.where(known, -np.inf, -(means + 3 * spreads)), kind="stable")[:_CONTENDERS]
    contenders = contenders[~lost[contenders]]
    numbers, means = numbers[contenders], means[contenders]
    draws = surrogate.sample(x[contenders], base[contenders], _SAMPLES_EACH, rng)
    has_value = np.isin(numbers, [each.number for each in measured])
    best = int(np.argmax(np.where(has_value, means, -np.inf))) if has_value.any() else None
    return Outlook(numbers, ~np.isin(numbers, list(tried)), draws, best)


def _logarithms(expected: Expected | None, numbers: np.ndarray, measured: Sequence[Seen]) -> np.ndarray:
    """Logarithms of the values that the physics predicts, or of the mean measured value where it predicts none."""
    if expected is None:
        values = [each.value for each in measured if each.value]
        return np.full(len(numbers), float(np.mean(np.log(values))) if values else 0.0)
    return _floored(np.asarray(expected(numbers), dtype=float))


def _floored(values: np.ndarray, top: float | None = None) -> np.ndarray:
    top = np.max(values, initial=0.0) if top is None else top
    return np.log(np.maximum(values, FLOOR * top)) if top > 0 else np.zeros(len(values))


def _learnt(
    numbers: np.ndarray, x: np.ndarray, base: np.ndarray, measured: Sequence[Seen], pending: Collection[int],
    rng: np.random.Generator,
) -> Surrogate:  # fmt: skip
    """The surrogate fitted to the measured points; points being measured get the values that it predicts for them."""
    rows = np.searchsorted(numbers, [each.number for each in measured])
    values = np.array([each.value for each in measured], dtype=float)
    y, error = _floored(values), np.array([each.error for each in measured], dtype=float)
    surrogate = Surrogate.fit(x[rows], base[rows], y, error, rng)
    waiting = np.flatnonzero(np.isin(numbers, list(pending)))
    if not len(waiting) or not len(rows):
        return surrogate
    believed, _ = surrogate.moments(x[waiting], base[waiting])
    rows = np.concatenate([rows, waiting])
    y, error = np.concatenate([y, believed]), np.concatenate([error, np.zeros(len(waiting))])
    return Surrogate.fit(x[rows], base[rows], y, error, rng)


def _certainty(outlook: Outlook, margin: float) -> tuple[float, float]:
    """The probabilities that the best is within the margin of all points, and that an untried one beats it by more."""
    if outlook.best is None:
        return 0.0, 1.0
    own, reach = outlook.draws[:, outlook.best], -math.log1p(-margin)
    confidence = float(np.mean(outlook.draws.max(axis=1) <= own + reach))
    untried = outlook.draws[:, outlook.open]
    doubt = float(np.mean(untried.max(axis=1) > own + reach)) if untried.shape[1] else 0.0
    return confidence, doubt


def _reason_to_stop(space: Space, outlook: Outlook, tried: int, doubt: float, aim: Aim) -> str:
    if not outlook.open.any():
        return f"all {tried} points were tried"
    if tried >= min(_SURE_AFTER, aim.most) and outlook.best is not None and doubt <= 1 - aim.sure:
        return f"estimated probability that an untried point is > {aim.margin:.1%} better: {doubt:.0%}"
    if tried >= aim.most:
        return (
            f"{tried} of {space.size} points were tried, as many as the plan allows; estimated "
            f"probability that an untried point is > {aim.margin:.1%} better: {doubt:.0%}"
        )
    return ""


def _most_telling(outlook: Outlook) -> tuple[int, float]:
    """The open point with the largest expected improvement over the best, and that improvement relative to the best."""
    best = 0.0 if outlook.best is None else outlook.draws[:, [outlook.best]]
    gains = np.expm1(np.clip(outlook.draws - best, 0, 3)).mean(axis=0)
    # where no draw improves: the point that comes closest
    score = gains + 1e-6 * np.mean(outlook.draws - best, axis=0)
    index = int(np.argmax(np.where(outlook.open, score, -np.inf)))
    return index, float(gains[index])
