"""Optuna's ask and tell over the points of a space: the model's decision, or one of Optuna's own samplers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from harness.sweep.optimizer.decide import Aim, Decision, Expected, Seen, decide
from harness.sweep.optimizer.space import Space

KINDS = "model", "tpe", "random"
_ASKS = 64  # of a sampler that keeps suggesting points already tried

optuna.logging.set_verbosity(optuna.logging.WARNING)


def next_point(
    space: Space, seen: Sequence[Seen], in_flight: Collection[int], kind: str, expected: Expected | None, aim: Aim,
    seed: int,
) -> Decision:  # fmt: skip
    """The next point by one of ``KINDS``, or the reason to stop. The same history and seed give the same decision.

    Optuna's own samplers estimate no confidence: they stop when as many points were tried as ``aim`` allows.
    """
    if kind == "model":
        return decide(space, seen, in_flight, expected, aim, seed)
    tried, values = {each.number for each in seen} | set(in_flight), [each for each in seen if each.value is not None]
    best = max(values, key=lambda each: each.value).number if values else None
    if len(tried) >= min(aim.most, space.size):
        return Decision(None, f"{len(tried)} of {space.size} points were tried", best, math.nan, math.nan, space.size)
    number = _untried(space, study_of(space, seen, in_flight, sampler_of(kind, seed * 1_000_003 + len(tried))), tried)
    return Decision(number, "", best, math.nan, math.nan, space.size)


def sampler_of(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of a kind other than our model."""
    return optuna.samplers.TPESampler(seed=seed) if kind == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def study_of(
    space: Space, seen: Sequence[Seen], in_flight: Collection[int], sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.Study:
    """An in-memory study with the history, usable by Optuna's plots and importances.

    Its parameters are ``space.names``, with indices of values in their columns; points in flight are running trials.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="maximize", sampler=sampler)
        known = distributions(space)
        for each in seen:
            state = TrialState.FAIL if each.value is None else TrialState.COMPLETE
            levels = space.levels(each.number)
            study.add_trial(create_trial(state=state, value=each.value, params=levels, distributions=known))
        for number in in_flight:
            levels = space.levels(number)
            study.add_trial(create_trial(state=TrialState.RUNNING, params=levels, distributions=known))
    return study


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """By column: indices of ordered values, or choices."""
    return {
        name: IntDistribution(0, count - 1) if ordered else CategoricalDistribution(tuple(range(count)))
        for name, count, ordered in zip(space.names, map(len, space.columns), space.ordered, strict=True)
    }


def _untried(space: Space, study: optuna.Study, tried: Collection[int]) -> int:
    known = distributions(space)
    for _ in range(_ASKS):
        trial = study.ask(known)
        number = space.lowest(space.at(trial.params))
        if number not in tried:
            return number
        study.tell(trial, state=TrialState.FAIL)
    rng = np.random.default_rng([len(tried), space.size])
    numbers = (space.lowest(int(number)) for number in rng.permutation(min(space.size, 1 << 20)))
    return next(number for number in numbers if number not in tried)
