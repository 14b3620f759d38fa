"""The selection bias of the best of many single ladders: by how much it is too high before it is measured again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from harness.capacity.models.between_ladders import Between
from harness.records.fit import FittedDeployment

_DRAWS = 2000


def selection_bias(fits: Sequence[FittedDeployment], best: int, between: Between, rng: np.random.Generator) -> float:
    """By how many times the best of single ladders is too high, on average; 1 where it was measured again.

    A parametric bootstrap: rates as measured, each with the factor of another ladder; the mean factor of the highest.
    How far ladders differ is not known, but it is one figure for all of them.
    """
    rates = np.array([each.rate() for each in fits if each.rate() > 0])
    if len(rates) < 2 or len(fits[best].trial_ids) > 1:
        return 1.0
    logs = np.log(between.draw(1, rng, _DRAWS, of=len(rates)))
    highest = np.argmax(np.log(rates)[:, None] + logs, axis=0)
    return max(math.exp(float(np.mean(logs[highest, np.arange(_DRAWS)]))), 1.0)
